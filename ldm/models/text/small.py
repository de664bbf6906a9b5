"""Small CLIP text towers with a tokenizer of their own: what the tiny configurations freeze.

Nothing is downloaded: the vocabulary is learned from captions, the weights are drawn from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch

from ldm.models.text.encoder import HuggingFaceTextEncoder
from ldm.models.text.vocabulary import BEGIN, END


def random_text_encoder(
    captions: Iterable[str],
    *,
    width: int = 64,
    layers: int = 2,
    vocab_size: int = 1_000,
    max_tokens: int = 77,
    seed: int = 0,
) -> HuggingFaceTextEncoder:
    """An untrained CLIP text tower with a BPE tokenizer made from `captions`.

    Even random token states tell words apart and keep their order, so a denoiser can learn from
    them; this is what the tiny configurations freeze. The global random state is left alone.

    Args:
        captions: texts whose words the tokenizer should know; others are spelled in bytes.
        width: D, a multiple of 32 (the head dimension) or less than 32.
        layers: transformer blocks.
        vocab_size: most entries of the vocabulary; 514 are bytes and control tokens.
        max_tokens: length of the position table.
        seed: of the weights.
    """
    from transformers import CLIPTextModel

    tokenizer = train_bpe(captions, vocab_size=vocab_size, max_tokens=max_tokens)
    config = clip_text_config(tokenizer, width=width, layers=layers, heads=max(1, width // 32))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that seeds GPUs as well
        return HuggingFaceTextEncoder(CLIPTextModel(config), tokenizer)


def train_bpe(captions: Iterable[str], *, vocab_size: int, max_tokens: int) -> Any:
    """A byte-level BPE in CLIP's format (lower case, `</w>` at word ends), learned from captions.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4; Sennrich et al. 2016.

    Args:
        captions: the corpus; the order does not matter.
        vocab_size: most entries; the 512 byte entries and 2 control tokens are always there,
            however small it is.
        max_tokens: what the tokenizer states as its longest input.

    Returns:
        A `transformers.CLIPTokenizer` that can spell every string.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer().backend_tokenizer  # for its normaliser and word splitting
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte at the end of a word, too: nothing is unknown. Named here because the learner would
    # otherwise number them in the random order of its hash table, and ties between merges follow.
    at_word_end = [f"{symbol}</w>" for symbol in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[BEGIN, END, *at_word_end],  # END must not be 2, CLIP's mark of old files
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    learner.train_from_iterator(captions, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_tokens)


def clip_text_config(tokenizer: Any, *, width: int, layers: int, heads: int) -> Any:
    """The `CLIPTextConfig` of a small text tower for a tokenizer of `train_bpe`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
