"""CLIP's own tokenizer of 49,408 entries, from the vocabulary that the package open_clip has.

The file is the one that OpenAI published with CLIP (MIT licence). It is found without importing
open_clip, and nothing is looked up on a network.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

from ldm.errors import ExitCode, LdmError, missing_package

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894
"""How many of the merges in the file CLIP uses: 49,408 less 512 bytes and 2 control tokens."""


def clip_tokenizer(pad: str = END, max_tokens: int = 77) -> Any:
    """CLIP's tokenizer.

    Args:
        pad: what it pads with: its end token in OpenAI's models (Stable Diffusion 1, the first
            encoder of SDXL and SD3), "!", whose id is 0, in those of OpenCLIP.
        max_tokens: what it states as its longest input.

    Returns:
        A `transformers.CLIPTokenizer`.

    Raises:
        LdmError: the package open_clip is not installed, or its file is damaged.
    """
    from transformers import CLIPTokenizer

    merges = _merges(_file())
    symbols = byte_symbols()
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocabulary = {entry: number for number, entry in enumerate([*entries, BEGIN, END])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=max_tokens
    )


def byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return [*map(chr, printable), *(chr(256 + number) for number in range(len(hidden)))]


def _file() -> Path:
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise missing_package("open_clip_torch", "openclip", "CLIP's vocabulary")
    return Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 1 + MERGES]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
        raise _damaged(path, f"it holds {len(pairs)} merges")
    return [(first, second) for first, second in pairs]


def _damaged(path: Path, why: str) -> LdmError:
    return LdmError(
        f"CLIP's vocabulary cannot be read ({why})",
        where=str(path),
        fix="install open_clip_torch again",
        code=ExitCode.IO,
    )
