"""Test set-up: no network, one thread per process for equal numbers everywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import ldm  # noqa: E402,F401
import torch  # noqa: E402

torch.set_num_threads(2)
