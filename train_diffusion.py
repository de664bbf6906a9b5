"""Trains a denoiser: `python train_diffusion.py --config configs/demo/dit.yaml [key=value ...]`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-diffusion", *sys.argv[1:]]))
