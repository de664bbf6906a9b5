"""`python -m ldm` is the command `ldm`."""

from ldm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
