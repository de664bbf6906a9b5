"""Draws pictures: `python infer.py --model runs/demo --prompt "a red circle"`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
