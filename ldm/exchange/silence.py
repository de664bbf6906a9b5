"""A T5 that says nothing, for SD3 models without one.

StableDiffusion3Pipeline.from_pretrained wants a third encoder, and fills its place with zeros when
it is told at every call that there is none. One layer whose last norm is 0 gives the same zeros, so
that the directory opens without arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.models.text.files import quiet

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]


def write_silent_t5(folder: Path, width: int) -> dict[str, tuple[str, str]]:
    """Writes `text_encoder_3/` and `tokenizer_3/`; returns their places in model_index.json."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    config = T5Config(
        vocab_size=len(PIECES),
        d_model=width,
        d_kv=1,
        d_ff=1,
        num_layers=1,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = T5EncoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    words = T5Tokenizer(vocab=PIECES, extra_ids=0, model_max_length=512)
    with quiet():
        model.save_pretrained(folder / "text_encoder_3", safe_serialization=True)
        words.save_pretrained(folder / "tokenizer_3")
    return {
        "text_encoder_3": ("transformers", "T5EncoderModel"),
        "tokenizer_3": ("transformers", type(words).__name__),
    }
