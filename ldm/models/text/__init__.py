"""Frozen text encoders, CLIP, OpenCLIP and T5: prompts in, token states and masks out.

`encoder.py` is one encoder, `joint.py` several at once, `loading.py` finds them on disk. Nothing
here trains (see `ldm.training.clip`).
"""

from ldm.models.text.classes import ClassTextEncoder
from ldm.models.text.emphasis import parse_emphasis
from ldm.models.text.encoder import HuggingFaceTextEncoder, Padding, Reading
from ldm.models.text.files import fill
from ldm.models.text.joint import FrozenTextEncoder, JointTextEncoder, Style
from ldm.models.text.loading import (
    load_diffusers_text,
    load_joint_text_encoder,
    load_text_encoder,
    restore_text_encoder,
)
from ldm.models.text.openclip import (
    OpenClipTower,
    load_open_clip,
    open_clip_text_config,
    open_clip_to_transformers,
    transformers_to_open_clip,
)
from ldm.models.text.published import PUBLISHED, published_text_model
from ldm.models.text.small import clip_text_config, random_text_encoder, train_bpe
from ldm.models.text.tokens import MAX_PROMPT_BYTES, TooLong
from ldm.models.text.vocabulary import clip_tokenizer

__all__ = [
    "MAX_PROMPT_BYTES",
    "PUBLISHED",
    "ClassTextEncoder",
    "FrozenTextEncoder",
    "HuggingFaceTextEncoder",
    "JointTextEncoder",
    "OpenClipTower",
    "Padding",
    "Reading",
    "Style",
    "TooLong",
    "clip_text_config",
    "clip_tokenizer",
    "fill",
    "load_diffusers_text",
    "load_joint_text_encoder",
    "load_open_clip",
    "load_text_encoder",
    "open_clip_text_config",
    "open_clip_to_transformers",
    "parse_emphasis",
    "published_text_model",
    "random_text_encoder",
    "restore_text_encoder",
    "train_bpe",
    "transformers_to_open_clip",
]
