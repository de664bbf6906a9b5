"""Test set-up: nothing reaches a network, and one thread, which is fastest for small tensors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import torch  # noqa: E402

import ldm  # noqa: E402, F401  (before anything that imports torchvision)

# a busy machine is no failure, and the same examples are tried everywhere
hypothesis.settings.register_profile("everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("everywhere")

torch.set_num_threads(1)
