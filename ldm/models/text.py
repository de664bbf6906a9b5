"""Frozen text encoders: prompts in, masked token states out. CLIP and T5, ours or Hugging Face's.

A self-trained CLIP and `openai/clip-vit-large-patch14` take the same path through this file. It
trains nothing (see `ldm.training.clip`) and reads no files (see `ldm.models.text_files`).

B prompts, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError
from ldm.models.identity import weights_sha256
from ldm.models.text_files import KINDS, load_model, load_tokenizer, locate, quiet
from ldm.types import TextEmbedding

MAX_PROMPT_BYTES = 64 * 1024
"""Longer prompts are refused before they are tokenised: no encoder reads that far."""

TooLong = Literal["error", "truncate"]

log = logging.getLogger(__name__)


class HuggingFaceTextEncoder(nn.Module):
    """A frozen CLIP text tower or T5 encoder behind `ldm.types.TextEncoder`.

    Args:
        model: CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel.
        tokenizer: its tokenizer.
        max_tokens: most tokens of a prompt, control tokens included; None takes what the encoder
            can. CLIP is limited by its position table, T5 by its tokenizer's stated length.
        pad_to: pad the *embedding* with zero states (mask False) up to this length, so 77, 128 or
            256 work for every encoder; None pads to the longest prompt of the batch.
        too_long: refuse a longer prompt, or cut it (the end token stays) and count it in
            `truncated_prompts`.

    Raises:
        LdmError: CONFIG, if `max_tokens` or `pad_to` cannot hold a prompt or exceed the encoder.
    """

    model: Any  # of transformers, whose classes carry no usable types

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_tokens: int | None = None,
        pad_to: int | None = None,
        too_long: TooLong = "error",
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.too_long = too_long
        self.pad_to = pad_to
        self.truncated_prompts = 0
        self.prefix, self.suffix = _control_tokens(tokenizer)
        self.max_tokens = self._limit(max_tokens)

    @property
    def width(self) -> int:
        """Width D of the token states."""
        return int(self.model.config.hidden_size)

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled vector: None for T5, which has none."""
        if self.kind == "t5":
            return None
        projection = getattr(self.model, "text_projection", None)
        return self.width if projection is None else int(projection.out_features)

    @property
    def kind(self) -> str:
        """`clip` or `t5`."""
        return KINDS[self.model.config.model_type]

    def train(self, mode: bool = True) -> HuggingFaceTextEncoder:
        """Stays in eval mode: a frozen encoder with dropout would not be a function."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeds prompts.

        Args:
            prompts: B strings of at most 64 KiB.

        Returns:
            tokens (B, L, D) float32, zero where `mask` is False; mask (B, L), True for the words
            and the control tokens around them; pooled (B, P) float32, or None for T5.

        Raises:
            LdmError: USAGE, for a prompt that is no text, or longer than `max_tokens`.
        """
        ids, mask = self.tokenize(prompts)
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled = None if self.kind == "t5" else self._pool(states, mask).float()
        tokens = states.float() * mask[..., None]
        missing = 0 if self.pad_to is None else self.pad_to - mask.shape[1]
        tokens = nn.functional.pad(tokens, (0, 0, 0, missing))
        return TextEmbedding(tokens, nn.functional.pad(mask, (0, missing)), pooled)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) int64 padded to the longest prompt, and their mask (B, L) bool.

        The mask comes from the lengths, not from comparing ids with the padding id: CLIP pads with
        its end token, whose first occurrence is real.

        Raises:
            LdmError: as `forward`.
        """
        words = self._words(prompts)
        rows = [self._frame(prompt, ids) for prompt, ids in zip(prompts, words, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        pad = self.tokenizer.pad_token_id
        ids = torch.full(mask.shape, self.suffix[-1] if pad is None else pad)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the embeddings, as JSON values: equal wherever the files lie.

        Weights are hashed as float32, so a bfloat16 file has one identity however it is loaded.
        Computed once, for the encoder is frozen.
        """
        config = self.model.config
        return {
            "kind": self.kind,
            "width": self.width,
            "config": {name: getattr(config, name) for name in BEHAVIOUR[self.kind]},
            "weights": weights_sha256(self.model),
            "tokenizer": _tokenizer_sha256(self.tokenizer, self.prefix, self.suffix),
        }

    def save(self, directory: Path | str) -> None:
        """Writes `text_encoder/` (safetensors) and `tokenizer/`, the layout of diffusers."""
        with quiet():
            self.model.save_pretrained(Path(directory) / "text_encoder", safe_serialization=True)
            self.tokenizer.save_pretrained(Path(directory) / "tokenizer")

    def _words(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt's own text. Whatever a prompt says, it yields no control token."""
        if isinstance(prompts, str) or not prompts:
            raise LdmError(f"a batch of prompts is wanted, got {prompts!r:.60}", where="prompt")
        for prompt in prompts:
            _check_prompt(prompt)
        encoded = self.tokenizer(
            list(prompts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        # split_special_tokens reads "<|endoftext|>" as text; Unigram models still find "</s>" as a
        # piece of their vocabulary, so what is left is dropped.
        control = set(self.tokenizer.all_special_ids)
        if self.kind == "t5":
            control.discard(self.tokenizer.unk_token_id)
        return [[token for token in row if token not in control] for row in encoded["input_ids"]]

    def _frame(self, prompt: str, words: list[int]) -> list[int]:
        room = self.max_tokens - len(self.prefix) - len(self.suffix)
        if len(words) > room and self.too_long == "error":
            count = len(words) + len(self.prefix) + len(self.suffix)
            raise LdmError(
                f"prompt {_start(prompt)!r} has {count} tokens, the text encoder takes "
                f"{self.max_tokens}",
                where="prompt",
                fix="shorten it, or allow truncation (too_long: truncate)",
            )
        if len(words) > room:
            if not self.truncated_prompts:
                log.warning(
                    "prompt %r has more than %d tokens and is cut; others may be, silently",
                    _start(prompt),
                    self.max_tokens,
                )
            self.truncated_prompts += 1
        return [*self.prefix, *words[:room], *self.suffix]

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        # the end token is the last real one: no dependence on the eos id of config.json, which is
        # wrong (2) in every file OpenAI published
        last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        projection = getattr(self.model, "text_projection", None)
        return last if projection is None else projection(last)

    def _limit(self, wanted: int | None) -> int:
        clip = self.kind == "clip"
        # T5's positions are relative and have no end; 512 is what it was trained with
        able = int(self.model.config.max_position_embeddings) if clip else MAX_PROMPT_BYTES
        usual = min(able if clip else 512, int(self.tokenizer.model_max_length))
        stated = usual if self.pad_to is None else min(usual, self.pad_to)
        limit = stated if wanted is None else wanted
        least = len(self.prefix) + len(self.suffix) + 1
        if not least <= limit <= able:
            raise LdmError(
                f"max_tokens={limit} is impossible: this {self.kind} encoder takes "
                f"{least} to {able} tokens",
                where="max_tokens",
                fix=f"use {stated}",
                code=ExitCode.CONFIG,
            )
        if self.pad_to is not None and self.pad_to < limit:
            raise LdmError(
                f"pad_to={self.pad_to} is shorter than max_tokens={limit}",
                where="pad_to",
                fix=f"use pad_to: {limit} or more, or a smaller max_tokens",
                code=ExitCode.CONFIG,
            )
        return limit


def load_text_encoder(
    source: Path | str,
    *,
    max_tokens: int | None = None,
    pad_to: int | None = None,
    too_long: TooLong = "error",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HuggingFaceTextEncoder:
    """Loads a frozen text encoder.

    Args:
        source: a directory with `text_encoder/` and `tokenizer/` (a run, a diffusers model, the
            result of `ldm train-clip`), a flat Hugging Face directory, or a Hub id. A Hub id that
            is in the local cache is never looked up on the network.
        max_tokens, pad_to, too_long: see `HuggingFaceTextEncoder`.
        device: where the encoder lives.
        dtype: of its weights; embeddings are float32 whatever it is.

    Raises:
        LdmError: IO for files that are missing or damaged, CONFIG for an encoder that is neither
            CLIP nor T5 and for impossible lengths.
    """
    model_dir, tokenizer_dir = locate(source)
    model, tokenizer = load_model(model_dir, dtype), load_tokenizer(tokenizer_dir)
    return HuggingFaceTextEncoder(
        model.to(device), tokenizer, max_tokens=max_tokens, pad_to=pad_to, too_long=too_long
    )


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


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise LdmError(f"a prompt must be text, got {type(prompt).__name__}", where="prompt")
    if "\0" in prompt:
        raise LdmError(f"prompt {_start(prompt)!r} contains a NUL character", where="prompt")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise LdmError(f"prompt {_start(prompt)!a} is not valid text", where="prompt") from error
    if size > MAX_PROMPT_BYTES:
        raise LdmError(
            f"prompt {_start(prompt)!r} has {size} bytes, at most {MAX_PROMPT_BYTES} are read",
            where="prompt",
            fix="shorten it",
        )


def _start(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:40]}..."


def _control_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: (BOS; EOS) for CLIP, (; EOS) for T5."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    begin = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    prefix, suffix = framed[:begin], framed[begin + len(bare) :]
    assert suffix, "CLIP and T5 both end a prompt with a control token"
    return prefix, suffix


def _tokenizer_sha256(tokenizer: Any, prefix: list[int], suffix: list[int]) -> str:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    said = [parts[name] for name in ("normalizer", "pre_tokenizer", "model")]
    text = json.dumps([*said, prefix, suffix, tokenizer.pad_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


BEGIN, END = "<|startoftext|>", "<|endoftext|>"

BEHAVIOUR = {
    "clip": ("hidden_act", "layer_norm_eps", "num_attention_heads"),
    "t5": (
        "feed_forward_proj",
        "layer_norm_epsilon",
        "num_heads",
        "relative_attention_max_distance",
        "relative_attention_num_buckets",
    ),
}
"""Settings that change embeddings without changing any weight."""
