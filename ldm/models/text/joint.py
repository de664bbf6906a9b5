"""Several text encoders as one: side by side (SDXL), CLIP states followed by T5's (SD3), or the
states of T5 with the pooled vector of a CLIP (FLUX).

B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.errors import ExitCode, LdmError
from ldm.models.identity import value_sha256
from ldm.models.text.classes import ClassTextEncoder
from ldm.models.text.encoder import MASK_RULES, HuggingFaceTextEncoder, Padding, Reading, zeroed
from ldm.models.text.tokens import TooLong
from ldm.types import TextEmbedding

Style = Literal["sdxl", "sd3", "flux"]


class JointTextEncoder(nn.Module):
    """Frozen text encoders whose embeddings are put together; the interface is that of one.

    Args:
        encoders: sdxl: two CLIPs, or the second alone (the refiner). sd3: two CLIPs with a
            projection, then T5 or nothing. CLIPs read layer -2 without the final norm. flux: a
            CLIP, then T5.
        style: sdxl puts token states side by side, and pools with the last encoder. sd3 puts CLIP's
            side by side, fills them with zeros to the width of T5, lets T5's states follow, and
            pools with both CLIPs. flux takes the states of T5 and the pooled vector of CLIP, which
            therefore cuts long prompts without a word.
        t5_width: width of the embedding of sd3 without T5, whose states are then zeros that are
            attended, as diffusers feeds them.
        t5_tokens: how many of them; with T5, its own `max_tokens` counts.

    Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1; Esser et al. 2024 (2403.03206),
    section 4 and figure 2.

    Raises:
        LdmError: CONFIG for encoders that cannot be put together so.
    """

    def __init__(
        self,
        encoders: Sequence[HuggingFaceTextEncoder],
        style: Style,
        *,
        t5_width: int | None = None,
        t5_tokens: int = 256,
    ) -> None:
        super().__init__()
        self.encoders: Any = nn.ModuleList(encoders)  # a list of what it holds, to a type checker
        self.style, self.zero_null = style, False
        self.clips = [encoder for encoder in encoders if encoder.kind == "clip"]
        self._check(t5_width)
        self.t5_width = t5_width if self.t5 is None else self.t5.width
        self.t5_tokens = t5_tokens if self.t5 is None else self.t5.max_tokens

    @property
    def t5(self) -> HuggingFaceTextEncoder | None:
        """The T5 of sd3, where there is one."""
        last: HuggingFaceTextEncoder = self.encoders[-1]
        return last if last.kind == "t5" else None

    @property
    def width(self) -> int:
        """Width D of the token states."""
        if self.style == "sd3":
            assert self.t5_width is not None, "checked when made"
            return self.t5_width
        if self.t5 is not None:
            return self.t5.width
        return sum(clip.width for clip in self.clips)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        pooled = self.clips if self.style == "sd3" else self.clips[-1:]  # flux has one
        return sum(clip.pooled_width or 0 for clip in pooled)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt that every encoder reads whole, control tokens included."""
        return min(encoder.max_tokens for encoder in self._readers)

    @property
    def _readers(self) -> list[HuggingFaceTextEncoder]:
        """The encoders that must read a prompt whole: all, or the T5 of flux."""
        return list(self.encoders[-1:] if self.style == "flux" else self.encoders)

    @property
    def too_long(self) -> TooLong:
        """What happens to longer prompts."""
        rule: TooLong = self._readers[0].too_long
        return rule

    @too_long.setter
    def too_long(self, rule: TooLong) -> None:
        for encoder in self._readers:
            encoder.too_long = rule

    @property
    def truncated_prompts(self) -> int:
        """How many prompts were cut so far, by the encoder that cut most."""
        return max(encoder.truncated_prompts for encoder in self._readers)

    @property
    def padding(self) -> Padding:
        """Whether padding is attended."""
        rule: Padding = self.clips[0].reading.padding
        return rule

    @property
    def mask_rule(self) -> str:
        """What a contract says of padding."""
        return MASK_RULES[self.padding]

    @property
    def settings(self) -> dict[str, Any]:
        """What `restore_text_encoder` needs besides the files and `max_tokens`, as JSON values."""
        t5: dict[str, Any] = {}
        if self.style != "sdxl":
            t5["t5_tokens"] = self.t5_tokens
        if self.style == "sd3":
            t5["t5_width"] = self.t5_width
        return {"style": self.style, "padding": self.padding, **t5}

    def train(self, mode: bool = True) -> JointTextEncoder:
        """Stays in eval mode, as each of its encoders."""
        return super().train(False)

    def to(  # type: ignore[override]
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> JointTextEncoder:
        """Moves all encoders; see `HuggingFaceTextEncoder.to`."""
        for encoder in self.encoders:
            encoder.to(device, dtype)
        return self

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], weighting: bool = False) -> TextEmbedding:
        """Embeds prompts; arguments, result and errors as of one encoder.

        Long prompts in chunks are broken between the same words for all CLIPs.
        """
        if self.style == "flux":
            states, pooled = self.encoders[1](prompts, weighting), self.encoders[0](prompts).pooled
            return TextEmbedding(states.tokens, states.mask, pooled)
        readers = [clip.prompts for clip in self.clips]
        parts = []
        for clip in self.clips:
            others = [reader for reader in readers if reader is not clip.prompts]
            tokens = clip.prompts.encode(prompts, weighting=weighting, companions=others)
            parts.append(clip.embed(tokens))
        beside = side_by_side(parts)
        if self.style == "sdxl":
            return TextEmbedding(beside.tokens, beside.mask, parts[-1].pooled)
        after = self._t5_states(prompts, weighting, beside.tokens)
        widened = pad(beside.tokens, (0, self.width - beside.tokens.shape[2]))
        return TextEmbedding(
            torch.cat([widened, after.tokens], dim=1),
            torch.cat([beside.mask, after.mask], dim=1),
            torch.cat([part.pooled for part in parts if part.pooled is not None], dim=1),
        )

    def tokenize(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Token ids and mask of every encoder; see `HuggingFaceTextEncoder.tokenize`."""
        return [encoder.tokenize(prompts) for encoder in self.encoders]

    def null(self) -> TextEmbedding:
        """The embedding of no words, one row: of "", or zeros where `zero_null` is set."""
        empty = self([""])
        return zeroed(empty) if self.zero_null else empty

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the embeddings, as JSON values; see `HuggingFaceTextEncoder.identity`."""
        parts = [encoder.identity for encoder in self.encoders]
        return {
            "kind": "joint",
            "width": self.width,
            "weights": value_sha256({"weights": [part["weights"] for part in parts]}),
            "tokenizer": value_sha256({"tokenizer": [part["tokenizer"] for part in parts]}),
            "encoders": parts,
            "settings": self.settings,
        }

    def components(self) -> dict[str, tuple[str, str]]:
        """Folders that `save` writes, with library and class, as model_index.json has them."""
        found: dict[str, tuple[str, str]] = {}
        for encoder, suffix in zip(self.encoders, self.suffixes, strict=True):
            found |= encoder.components(suffix)
        return found

    def save(self, directory: Path | str) -> None:
        """Writes `text_encoder/`, `tokenizer/`, `text_encoder_2/` ...: the layout of diffusers."""
        for encoder, suffix in zip(self.encoders, self.suffixes, strict=True):
            encoder.save(directory, suffix)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the folders of the encoders."""
        return ("_2",) if len(self.encoders) == 1 else SUFFIXES[: len(self.encoders)]

    def _t5_states(self, prompts: Sequence[str], weighting: bool, like: Tensor) -> TextEmbedding:
        if self.t5 is not None:
            embedded: TextEmbedding = self.t5(prompts, weighting)
            return embedded
        shape = (len(prompts), self.t5_tokens)
        zeros = like.new_zeros(*shape, self.width)
        return TextEmbedding(zeros, torch.ones(shape, dtype=torch.bool, device=like.device))

    def _check(self, t5_width: int | None) -> None:
        kinds = [encoder.kind for encoder in self.encoders]
        legal = LEGAL[self.style]
        if kinds not in legal:
            raise _impossible(
                f"{self.style} cannot be made of {' + '.join(kinds)}",
                f"use {' or '.join(' + '.join(one) for one in legal)}, in this order",
            )
        if len({encoder.reading.padding for encoder in self.encoders}) > 1:
            raise _impossible("some encoders mask padding and others do not", "use one rule")
        if self.style == "flux":
            self.encoders[0].too_long = "truncate"
        if self.style != "sd3":
            return
        if any(getattr(clip.model, "text_projection", None) is None for clip in self.clips):
            raise _impossible(
                "the CLIPs of sd3 pool through a projection, and one has none",
                "load them as CLIPTextModelWithProjection",
            )
        beside = sum(clip.width for clip in self.clips)
        width = self.t5.width if self.t5 is not None else t5_width
        if width is None or width < beside:
            raise _impossible(
                f"the width {width} of T5 cannot hold CLIP states of {beside} side by side",
                "use sdxl, or a wider T5; without T5, give t5_width (4096 in SD3)",
            )


def side_by_side(parts: Sequence[TextEmbedding]) -> TextEmbedding:
    """Token states (B, L, D_1 + D_2 ...) of embeddings of the same prompts, nothing pooled.

    Shorter ones are filled with zeros; a position counts where any of them has a token.
    """
    length = max(part.tokens.shape[1] for part in parts)
    tokens = [pad(part.tokens, (0, 0, 0, length - part.tokens.shape[1])) for part in parts]
    masks = [pad(part.mask, (0, length - part.mask.shape[1])) for part in parts]
    return TextEmbedding(torch.cat(tokens, dim=2), torch.stack(masks).any(0))


def penultimate(padding: Padding) -> Reading:
    """How both styles read a CLIP."""
    return Reading(padding, layer=-2, final_norm=False)


def _impossible(what: str, fix: str) -> LdmError:
    return LdmError(what, where="text.style", fix=fix, code=ExitCode.CONFIG)


SUFFIXES = ("", "_2", "_3")
LEGAL: dict[str, list[list[str]]] = {
    "sdxl": [["clip", "clip"], ["clip"]],
    "sd3": [["clip", "clip", "t5"], ["clip", "clip"]],
    "flux": [["clip", "t5"]],
}
"""Kinds of encoders in each style."""

FrozenTextEncoder = HuggingFaceTextEncoder | JointTextEncoder | ClassTextEncoder
"""All have one interface."""
