"""Trains a KL-VAE: `python train_vae.py --config configs/demo/vae.yaml [key=value ...]`."""

import sys

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-vae", *sys.argv[1:]]))
