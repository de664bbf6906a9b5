"""One frozen text encoder: CLIP, OpenCLIP or T5, of transformers or seen through its surface.

A self-trained CLIP and `openai/clip-vit-large-patch14` take the same path through this file. It
trains nothing (see `ldm.training.clip`) and reads no files (see `files.py`).

B prompts, R rows (one per prompt, more where prompts are read in chunks), L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError
from ldm.models.identity import weights_sha256
from ldm.models.text.emphasis import emphasised
from ldm.models.text.files import KINDS, quiet
from ldm.models.text.tokens import MAX_PROMPT_BYTES, PromptTokenizer, Tokens, TooLong
from ldm.types import TextEmbedding

Padding = Literal["masked", "attended"]

MASK_RULES = {
    "masked": "padding is masked in every attention",
    "attended": "padding is attended like words",
}
"""What a contract says of the two."""


@dataclass(frozen=True)
class Reading:
    """What is taken from an encoder; the defaults are this project's own.

    Args:
        padding: masked: prompts are as long as they are, and nothing attends to padding. attended:
            prompts are padded to `max_tokens` with the tokenizer's own token, and every position
            counts, as the published Stable Diffusion models were trained.
        layer: -1 is the output of the last layer, -2 that of the one before ("clip skip").
        final_norm: apply the encoder's final norm to it: yes for Stable Diffusion 1 and 2, whatever
            the layer; no for SDXL and SD3, which read layer -2.
        lower_case: lower the case and strip outer spaces first, as PixArt does.
    """

    padding: Padding = "masked"
    layer: int = -1
    final_norm: bool = True
    lower_case: bool = False

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        plain = asdict(Reading())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


class HuggingFaceTextEncoder(nn.Module):
    """A frozen CLIP text tower or T5 encoder behind `ldm.types.TextEncoder`.

    Args:
        model: CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel or an `OpenClipTower`.
        tokenizer: its tokenizer.
        max_tokens: most tokens of a prompt, control tokens included; None takes what the encoder
            can. CLIP is limited by its position table, T5 by its tokenizer's stated length.
        pad_to: pad the *embedding* with zero states (mask False) up to this length, so 77, 128 or
            256 work for every encoder; None pads to the longest prompt of the batch.
        too_long: refuse a longer prompt, cut it (the end token stays) and count it in
            `truncated_prompts`, or read it in chunks of `max_tokens`, each with control tokens of
            its own, whose states follow each other.
        reading: which states, and whether padding counts.

    Raises:
        LdmError: CONFIG, if `max_tokens` or `pad_to` cannot hold a prompt or exceed the encoder, or
            if there is no such layer.
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
        reading: Reading = Reading(),  # noqa: B008, frozen
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.pad_to, self.reading = tokenizer, pad_to, reading
        self.zero_null = False
        self.prompts = PromptTokenizer(
            tokenizer,
            self.kind,
            attended=reading.padding == "attended",
            lower_case=reading.lower_case,
            too_long=too_long,
        )
        self.prompts.max_tokens = self._limit(max_tokens)
        self._check_layer()

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

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt, or of each of its chunks, control tokens included."""
        return self.prompts.max_tokens

    @property
    def too_long(self) -> TooLong:
        """What happens to longer prompts."""
        return self.prompts.too_long

    @too_long.setter
    def too_long(self, rule: TooLong) -> None:
        self.prompts.too_long = rule

    @property
    def truncated_prompts(self) -> int:
        """How many prompts were cut so far."""
        return self.prompts.truncated_prompts

    @property
    def prefix(self) -> list[int]:
        """Control tokens before a text."""
        return self.prompts.prefix

    @property
    def suffix(self) -> list[int]:
        """Control tokens after a text."""
        return self.prompts.suffix

    @property
    def mask_rule(self) -> str:
        """What a contract says of padding."""
        return MASK_RULES[self.reading.padding]

    @property
    def settings(self) -> dict[str, Any]:
        """What `restore_text_encoder` needs besides the files and `max_tokens`, as JSON values."""
        padded = {} if self.pad_to is None else {"pad_to": self.pad_to}
        return {**self.reading.changed(), **padded}

    def train(self, mode: bool = True) -> HuggingFaceTextEncoder:
        """Stays in eval mode: a frozen encoder with dropout would not be a function."""
        return super().train(False)

    def to(  # type: ignore[override]
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HuggingFaceTextEncoder:
        """Moves the encoder. The output layers of T5's feed-forward blocks stay float32 in float16,
        which they overflow, as transformers keeps them when it loads such a model.
        """
        kept = []
        if self.kind == "t5" and dtype == torch.float16:
            kept = [
                (name, weight.detach().float())
                for name, weight in self.model.named_parameters()
                if name.endswith(".wo.weight")
            ]
        super().to(device=device, dtype=dtype)
        for name, weight in kept:
            parameter = self.model.get_parameter(name)
            parameter.data = weight.to(parameter.device)
        return self

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], weighting: bool = False) -> TextEmbedding:
        """Embeds prompts.

        Args:
            prompts: B strings of at most 64 KiB.
            weighting: read `(word:1.3)` as emphasis, see `parse_emphasis`.

        Returns:
            tokens (B, L, D) float32, zero where `mask` is False; mask (B, L), True for the words
            and the control tokens around them, and for padding that is attended; pooled (B, P)
            float32, or None for T5, of the first chunk and of unweighted words.

        Raises:
            LdmError: USAGE, for a prompt that is no text, or longer than `max_tokens`.
        """
        return self.embed(self.prompts.encode(prompts, weighting=weighting))

    def embed(self, tokens: Tokens) -> TextEmbedding:
        """The embedding of tokenised prompts."""
        device = next(self.model.parameters()).device
        ids, mask = tokens.ids.to(device), tokens.mask.to(device)
        attended = self.reading.padding == "attended"
        states, last = self._states(ids, None if attended else mask.long())
        states = states.float()
        if tokens.weights is not None:
            empty, _ = self._states(self.prompts.empty(ids.shape[1]).to(device), None)
            states = emphasised(states, empty.float(), tokens.weights.to(device))
        pooled = None if self.kind == "t5" else self._pool(last, mask).float()
        real = torch.ones_like(mask) if attended else mask
        states, real, first = together(states * real[..., None], real, tokens.prompt_of)
        missing = 0 if self.pad_to is None else max(0, self.pad_to - real.shape[1])
        return TextEmbedding(
            nn.functional.pad(states, (0, 0, 0, missing)),
            nn.functional.pad(real, (0, missing)),
            None if pooled is None else pooled[first.to(device)],
        )

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) int64 as the encoder sees them, and which of them are real, (B, L) bool.

        Padded to the longest prompt, or to `max_tokens` where padding is attended. A prompt in
        chunks has several rows.

        Raises:
            LdmError: as `forward`.
        """
        tokens = self.prompts.encode(prompts)
        return tokens.ids, tokens.mask

    def null(self) -> TextEmbedding:
        """The embedding of no words, one row: of "", or zeros where `zero_null` is set."""
        empty = self([""])
        return zeroed(empty) if self.zero_null else empty

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the embeddings, as JSON values: equal wherever the files lie.

        Weights are hashed as float32, so a bfloat16 file has one identity however it is loaded.
        Computed once, for the encoder is frozen.
        """
        config = self.model.config
        changed = self.reading.changed()
        return {
            "kind": self.kind,
            "width": self.width,
            "config": {name: getattr(config, name) for name in BEHAVIOUR[self.kind]},
            "weights": weights_sha256(self.model),
            "tokenizer": _tokenizer_sha256(self.tokenizer, self.prefix, self.suffix),
            **({"reading": changed} if changed else {}),
        }

    def components(self, suffix: str = "") -> dict[str, tuple[str, str]]:
        """Folders that `save` writes, with library and class, as model_index.json has them."""
        return {
            f"text_encoder{suffix}": ("transformers", type(self.model).__name__),
            f"tokenizer{suffix}": ("transformers", type(self.tokenizer).__name__),
        }

    def save(self, directory: Path | str, suffix: str = "") -> None:
        """Writes `text_encoder/` (safetensors) and `tokenizer/`, the layout of diffusers.

        `suffix` is for the second and third encoder of a model: `_2`, `_3`.
        """
        encoder, tokenizer = self.components(suffix)
        with quiet():
            self.model.save_pretrained(Path(directory) / encoder, safe_serialization=True)
            self.tokenizer.save_pretrained(Path(directory) / tokenizer)

    def _states(self, ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states asked for and the last ones after the final norm, both (R, L, D)."""
        layer, final_norm = self.reading.layer, self.reading.final_norm
        plain = layer == -1 and final_norm
        out = self.model(
            input_ids=ids, attention_mask=attention_mask, **({} if plain else EVERY_LAYER)
        )
        if plain:
            return out.last_hidden_state, out.last_hidden_state
        states = out.hidden_states[layer]
        if final_norm:
            tower = self.model.encoder if self.kind == "t5" else self.model
            states = getattr(tower, "text_model", tower).final_layer_norm(states)
        return states, out.last_hidden_state

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        # the end token is the last real one: no dependence on the eos id of config.json, which is
        # wrong (2) in every file OpenAI published
        last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        projection = getattr(self.model, "text_projection", None)
        return last if projection is None else projection(last)

    def _check_layer(self) -> None:
        layer, deepest = self.reading.layer, -int(self.model.config.num_hidden_layers)
        if not deepest <= layer <= -1:
            raise LdmError(
                f"layer {layer} does not exist: this encoder has {-deepest}",
                where="text.layer",
                fix=f"use {deepest} to -1",
                code=ExitCode.CONFIG,
            )
        if self.kind == "t5" and layer == -1 and not self.reading.final_norm:
            raise LdmError(
                "the last states of a T5 encoder come with their final norm",
                where="text.final_norm",
                fix="use text.final_norm=true, or a layer before the last",
                code=ExitCode.CONFIG,
            )

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


def together(states: Tensor, mask: Tensor, prompt_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks of each prompt one after the other, without the masked tokens between them.

    Args:
        states: (R, L, D), zero where masked.
        mask: (R, L).
        prompt_of: (R,), from 0 to B - 1 in order.

    Returns:
        states (B, C, D) and mask (B, C), and the first row of each prompt, (B,).
    """
    counts = torch.bincount(prompt_of)
    first = counts.cumsum(0) - counts
    if len(counts) == len(prompt_of):
        return states, mask, first
    rows = list(zip(states.split(counts.tolist()), mask.split(counts.tolist()), strict=True))
    joined = [chunk_states[chunk_mask] for chunk_states, chunk_mask in rows]
    lengths = torch.tensor([len(row) for row in joined], device=mask.device)
    span = torch.arange(int(lengths.max()), device=mask.device)
    padded = nn.utils.rnn.pad_sequence(joined, batch_first=True)
    return padded, span[None] < lengths[:, None], first


def zeroed(text: TextEmbedding) -> TextEmbedding:
    """Zeros in the shape of an embedding, its mask kept."""
    pooled = None if text.pooled is None else torch.zeros_like(text.pooled)
    return TextEmbedding(torch.zeros_like(text.tokens), text.mask, pooled)


def _tokenizer_sha256(tokenizer: Any, prefix: list[int], suffix: list[int]) -> str:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    said = [parts[name] for name in ("normalizer", "pre_tokenizer", "model")]
    text = json.dumps([*said, prefix, suffix, tokenizer.pad_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


EVERY_LAYER = {"output_hidden_states": True}

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
