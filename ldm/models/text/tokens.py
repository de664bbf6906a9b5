"""Prompts to token ids: control tokens, limits, padding, chunks and weights. No network.

R rows of tokens (one per prompt, or several where a long prompt is read in chunks), L tokens.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.errors import ExitCode, LdmError
from ldm.models.text.emphasis import parse_emphasis

MAX_PROMPT_BYTES = 64 * 1024
"""Longer prompts are refused before they are tokenised: no encoder reads that far."""
COMMA_REACH = 20
"""Tokens that a chunk may lose so that it ends after a comma (AUTOMATIC1111's default)."""

TooLong = Literal["error", "truncate", "chunk"]
Segments = list[tuple[str, float]]
"""Text and its weight."""
Row = list[tuple[int, float]]
"""Token ids and their weights."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts.

    Args:
        ids: (R, L) int64, padded.
        mask: (R, L), True for words and control tokens.
        weights: (R, L) float32, 1 where nothing is emphasised; None when that is everywhere.
        prompt_of: which prompt each row belongs to, (R,); rows of one prompt follow each other.
    """

    ids: Tensor
    mask: Tensor
    weights: Tensor | None
    prompt_of: Tensor


class PromptTokenizer:
    """A tokenizer with the limits of its encoder.

    Args:
        tokenizer: of transformers.
        kind: `clip` or `t5`.
        attended: pad to `max_tokens`, and read what the tokenizer pads with as diffusers does.
        lower_case: read prompts in lower case and without outer spaces.
        too_long: refuse a longer prompt, cut it, or read it in chunks.

    `max_tokens` is set by the encoder, which knows how far it can read.
    """

    def __init__(
        self, tokenizer: Any, kind: str, *, attended: bool, lower_case: bool, too_long: TooLong
    ) -> None:
        self.tokenizer, self.kind, self.too_long = tokenizer, kind, too_long
        self.attended, self.lower_case = attended, lower_case
        self.truncated_prompts = 0
        self.max_tokens = 0
        self.prefix, self.suffix = control_tokens(tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.suffix[-1] if pad is None else pad

    @property
    def room(self) -> int:
        """Most tokens of a prompt's own text in one row."""
        return self.max_tokens - len(self.prefix) - len(self.suffix)

    def encode(
        self,
        prompts: Sequence[str],
        *,
        weighting: bool = False,
        companions: Sequence[PromptTokenizer] = (),
    ) -> Tokens:
        """Token ids of prompts.

        Args:
            prompts: B strings of at most 64 KiB.
            weighting: read emphasis, see `parse_emphasis`.
            companions: tokenizers whose chunks must end where ours do.

        Raises:
            LdmError: USAGE, for a prompt that is no text, is longer than `max_tokens`, or has
                brackets without partners.
        """
        parsed = [self._segments(prompt, weighting) for prompt in _checked(prompts)]
        whole = self._whole(parsed)
        rows: list[Row] = []
        prompt_of: list[int] = []
        for number, (prompt, segments) in enumerate(zip(prompts, parsed, strict=True)):
            chunks = [whole[number]]
            if self.too_long == "chunk":
                chunks = self._chunks(segments, whole[number], companions)
            rows += [self._frame(prompt, chunk) for chunk in chunks]
            prompt_of += [number] * len(chunks)
        return self._padded(rows, prompt_of)

    def empty(self, length: int) -> Tensor:
        """Ids (1, length) of the empty prompt."""
        row = [*self.prefix, *self.suffix]
        return torch.tensor([row + [self.pad_id] * (length - len(row))])

    def _padded(self, rows: list[Row], prompt_of: list[int]) -> Tokens:
        lengths = torch.tensor([len(row) for row in rows])
        longest = self.max_tokens if self.attended else int(lengths.max())
        # from the lengths, not by comparing ids with the padding id: CLIP pads with its end token,
        # whose first occurrence is real
        mask = torch.arange(longest)[None] < lengths[:, None]
        ids = torch.full(mask.shape, self.pad_id)
        ids[mask] = torch.tensor([token for row in rows for token, _ in row])
        weights = None
        if any(weight != 1 for row in rows for _, weight in row):
            weights = torch.ones(mask.shape)
            weights[mask] = torch.tensor([weight for row in rows for _, weight in row])
        return Tokens(ids, mask, weights, torch.tensor(prompt_of))

    def _segments(self, prompt: str, weighting: bool) -> Segments:
        text = prompt.lower().strip() if self.lower_case else prompt
        return parse_emphasis(text) if weighting else [(text, 1.0)]

    def _whole(self, parsed: Sequence[Segments]) -> list[Row]:
        """The tokens of each prompt's own text, all tokenised in one call."""
        words = iter(self.words([text for segments in parsed for text, _ in segments]))
        return [
            [(token, weight) for _, weight in segments for token in next(words)]
            for segments in parsed
        ]

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Whatever a text says, it yields no control token."""
        if not texts:
            return []
        pad, ends = self.tokenizer.pad_token, [*self.prefix, *self.suffix]
        printable = self.attended and self.kind == "clip" and self.pad_id not in ends
        # Where "!" is the padding token (Stable Diffusion 2, SDXL), diffusers reads every "!" of a
        # prompt as padding, which weights trained on its embeddings have met.
        pieces = [text.split(pad) if printable else [text] for text in texts]
        encoded = self.tokenizer(
            [piece for parts in pieces for piece in parts],
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )
        # split_special_tokens reads "<|endoftext|>" as text; Unigram models still find "</s>" as a
        # piece of their vocabulary, so what is left is dropped.
        control = set(self.tokenizer.all_special_ids)
        if self.kind == "t5":
            control.discard(self.tokenizer.unk_token_id)
        found = iter(encoded["input_ids"])
        rows = []
        for parts in pieces:
            row: list[int] = []
            for number in range(len(parts)):
                row += [self.pad_id] if number else []
                row += [token for token in next(found) if token not in control]
            rows.append(row)
        return rows

    def _frame(self, prompt: str, words: Row) -> Row:
        if len(words) > self.room and self.too_long == "error":
            count = len(words) + len(self.prefix) + len(self.suffix)
            raise LdmError(
                f"prompt {_start(prompt)!r} has {count} tokens, the text encoder takes "
                f"{self.max_tokens}",
                where="prompt",
                fix="shorten it, or allow truncation (too_long: truncate) or chunks (chunk)",
            )
        if len(words) > self.room:
            if not self.truncated_prompts:
                log.warning(
                    "prompt %r has more than %d tokens and is cut; others may be, silently",
                    _start(prompt),
                    self.max_tokens,
                )
            self.truncated_prompts += 1
        before, after = ([(token, 1.0) for token in part] for part in (self.prefix, self.suffix))
        return [*before, *words[: self.room], *after]

    def _chunks(
        self, segments: Segments, whole: Row, companions: Sequence[PromptTokenizer]
    ) -> list[Row]:
        """Our tokens of each chunk; all tokenizers break between the same words."""
        texts = [text for text, _ in segments]
        if len(whole) <= self.room and all(
            sum(map(len, other.words(texts))) <= other.room for other in companions
        ):
            return [whole]
        group = (self, *companions)
        pieces = [
            (piece, weight)
            for text, weight in segments
            for word in re.findall(r"\S+", text)
            for piece in _fitting(word, group)
        ]
        ids = [each.words([piece for piece, _ in pieces]) for each in group]
        sizes = [[len(word) for word in words] for words in ids]
        commas = [piece.endswith(",") for piece, _ in pieces]
        ends = chunk_ends(sizes, [each.room for each in group], commas)
        return [
            [(token, pieces[at][1]) for at in range(begin, end) for token in ids[0][at]]
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        ]


def chunk_ends(
    sizes: Sequence[Sequence[int]], rooms: Sequence[int], commas: Sequence[bool]
) -> list[int]:
    """Where chunks end, as counts of words: greedy, and after a comma where one is near.

    Args:
        sizes: tokens of every word, once for each tokenizer; a word fits into an empty chunk.
        rooms: tokens of a chunk, for each tokenizer.
        commas: whether a word ends with a comma.
    """
    ends: list[int] = []
    begin, at, used = 0, 0, [0] * len(rooms)
    while at < len(commas):
        after = [now + words[at] for now, words in zip(used, sizes, strict=True)]
        if all(count <= room for count, room in zip(after, rooms, strict=True)):
            used, at = after, at + 1
            continue
        at = _after_comma(sizes[0], commas, begin, at)
        ends.append(at)
        begin, used = at, [0] * len(rooms)
    return [*ends, len(commas)]


def _after_comma(sizes: Sequence[int], commas: Sequence[bool], begin: int, end: int) -> int:
    """The place after the last comma of words begin..end, if at most COMMA_REACH tokens back."""
    lost = 0
    for place in range(end, begin, -1):
        if commas[place - 1]:
            return place
        lost += sizes[place - 1]
        if lost > COMMA_REACH:
            break
    return end


def _fitting(word: str, group: Sequence[PromptTokenizer]) -> list[str]:
    """The word, halved until each part fits into a chunk of every tokenizer."""
    if all(len(each.words([word])[0]) <= each.room for each in group):
        return [word]
    if len(word) == 1:
        raise LdmError(
            f"the character {word!r} takes more tokens than a chunk of "
            f"{min(each.room for each in group)}",
            where="max_tokens",
            fix="use a larger max_tokens",
            code=ExitCode.CONFIG,
        )
    half = len(word) // 2
    return _fitting(word[:half], group) + _fitting(word[half:], group)


def control_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text: (BOS; EOS) for CLIP, (; EOS) for T5."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    begin = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    prefix, suffix = framed[:begin], framed[begin + len(bare) :]
    assert suffix, "CLIP and T5 both end a prompt with a control token"
    return prefix, suffix


def _checked(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str) or not prompts:
        raise LdmError(f"a batch of prompts is wanted, got {prompts!r:.60}", where="prompt")
    for prompt in prompts:
        _check_prompt(prompt)
    return prompts


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
