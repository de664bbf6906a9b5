"""Class labels in place of an encoder: a caption names one of a list, the embedding is its number.

The denoiser learns what a class means. B captions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError, named
from ldm.models.identity import value_sha256
from ldm.models.text.encoder import MASK_RULES
from ldm.models.text.tokens import TooLong
from ldm.types import TextEmbedding


class ClassTextEncoder(nn.Module):
    """One-hot labels with the interface of a frozen text encoder; it has no weights.

    A caption is the name of a class, or its number; no words are the class K, "none", which caption
    dropout trains and guidance compares with. One-hot rows survive every precision, which numbers
    beyond 256 do not in bf16. A UNet or a DiT that reads tokens gets the row as its only token.

    Args:
        classes: K different names, none of them empty, in the order of their numbers.

    Raises:
        LdmError: CONFIG for names that cannot be told apart.
    """

    marker: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if not self.classes or "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise LdmError(
                "class names must be different, and none of them empty",
                where="text.classes",
                fix="give each class a name of its own",
                code=ExitCode.CONFIG,
            )
        self.numbers = {name: number for number, name in enumerate(self.classes)} | {
            "": len(self.classes)
        }
        self.too_long: TooLong = "error"
        self.zero_null = False
        self.truncated_prompts = 0
        self.register_buffer("marker", torch.zeros(()), persistent=False)  # for its device

    @property
    def width(self) -> int:
        """K + 1, of token and pooled vector alike."""
        return len(self.classes) + 1

    @property
    def pooled_width(self) -> int:
        """K + 1."""
        return self.width

    @property
    def kind(self) -> str:
        """`classes`."""
        return "classes"

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption: one."""
        return 1

    @property
    def mask_rule(self) -> str:
        """What a contract says of padding; there is none."""
        return MASK_RULES["masked"]

    @property
    def settings(self) -> dict[str, Any]:
        """What `restore_text_encoder` needs, as JSON values: all there is."""
        return {"classes": list(self.classes)}

    def forward(self, prompts: Sequence[str], weighting: bool = False) -> TextEmbedding:
        """Labels of captions; `weighting` has nothing to weigh, names are read as they are.

        Returns:
            tokens (B, 1, K + 1) and pooled (B, K + 1), one-hot float32.

        Raises:
            LdmError: USAGE, for a name that is no class; names the nearest.
        """
        numbers = torch.tensor([self.number(prompt) for prompt in prompts])
        rows = nn.functional.one_hot(numbers, self.width).to(self.marker.device, torch.float32)
        mask = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
        return TextEmbedding(rows[:, None], mask, rows)

    def number(self, prompt: str) -> int:
        """The class of a caption: its name, or its number in digits; K of no words."""
        wanted = prompt.strip()
        if wanted not in self.numbers and wanted.isdecimal() and int(wanted) < len(self.classes):
            return int(wanted)
        known = {name: number for name, number in self.numbers.items() if name or not wanted}
        return named("class", known, wanted)

    def null(self) -> TextEmbedding:
        """The label of no class, one row."""
        return self([""])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the embeddings, as JSON values."""
        names = value_sha256({"classes": list(self.classes)})
        return {"kind": self.kind, "width": self.width, "weights": names, "tokenizer": names}

    def components(self) -> dict[str, tuple[str, str]]:
        """Folders that `save` writes: none, a contract holds the names."""
        return {}

    def save(self, directory: Path | str) -> None:
        """Nothing to write; see `components`."""
