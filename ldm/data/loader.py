"""From a source and one integer cursor to this rank's micro-batches. Knows nothing of models.

The global batch of a step is the next `batch_size` positions of the data order. Ranks and
accumulation steps cut it into contiguous slices, so the set of samples of a step depends on the
cursor alone, not on how many processes share the work.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.transforms import Draws, fit, is_mirrored, sizes_of
from ldm.errors import ExitCode, LdmError
from ldm.randomness import positions
from ldm.types import Batch, Source


class Place(NamedTuple):
    """One position of the data order: which sample, in which epoch, where in the global batch."""

    epoch: int
    sample: int
    position: int


@dataclass(frozen=True)
class Share:
    """Which part of every global batch one process works on, in `accumulation` micro-batches.

    Raises:
        LdmError: code CONFIG if `batch_size` cannot be cut evenly, with values that can.
    """

    batch_size: int
    """Samples per optimizer step over all ranks and accumulation steps."""
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        if self.batch_size < 1 or self.accumulation < 1:
            raise LdmError(
                f"batch_size={self.batch_size} with accumulation={self.accumulation}: both must be "
                "at least 1",
                where="train.batch_size",
                code=ExitCode.CONFIG,
            )
        parts = self.world_size * self.accumulation
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            sizes = f"{lower} or {lower + parts}" if lower else f"{parts}"
            raise LdmError(
                f"batch_size={self.batch_size} cannot be cut into {self.world_size} ranks x "
                f"{self.accumulation} accumulation steps = {parts} equal parts",
                where="train.batch_size",
                fix=f"batch_size={sizes}{self._legal_accumulation()}",
                code=ExitCode.CONFIG,
            )

    def _legal_accumulation(self) -> str:
        per_rank, rest = divmod(self.batch_size, self.world_size)
        if rest:
            return ""
        legal = [str(steps) for steps in range(1, per_rank + 1) if per_rank % steps == 0]
        return f", or accumulation one of {', '.join(legal)}"

    def refuse_too_few(self, samples: int) -> None:
        """Stops with code BAD_DATA where a data set cannot fill one global batch."""
        if samples < self.batch_size:
            raise LdmError(
                f"{samples} samples are fewer than one global batch of {self.batch_size} "
                f"(= {self.micro_batch} per micro-batch x {self.world_size} ranks x "
                f"{self.accumulation} accumulation steps)",
                where="train.batch_size",
                fix=f"batch_size of at most {samples}, or more data",
                code=ExitCode.BAD_DATA,
            )

    @property
    def micro_batch(self) -> int:
        """Samples in one micro-batch of one rank."""
        return self.batch_size // (self.world_size * self.accumulation)


def micro_batches(share: Share, cursor: int, length: int, seed: int) -> Iterator[list[Place]]:
    """This rank's micro-batches for ever, `share.accumulation` of them per optimizer step.

    Args:
        cursor: samples consumed so far by all ranks together.
        length: samples in the data set.
        seed: the run's seed, which fixes the order.
    """
    while True:
        order = positions(cursor, share.batch_size, length, seed)
        for step in range(share.accumulation):
            # all ranks' slices of one micro-step lie side by side in the global batch
            start = (step * share.world_size + share.rank) * share.micro_batch
            part = order[start : start + share.micro_batch]
            yield [Place(epoch, sample, start + k) for k, (epoch, sample) in enumerate(part)]
        cursor += share.batch_size


@dataclass(kw_only=True)
class Loader:
    """Pictures and captions, fitted to the model's square, from any cursor on.

    A sample that cannot be used never ends the run and is never replaced by another: it comes as a
    mid-grey picture with an empty caption and weight 0, and its reason is kept in `bad`.

    Raises:
        LdmError: code CONFIG if the batch cannot be cut evenly; code BAD_DATA if the source has
            fewer samples than one global batch.
    """

    source: Source = field(kw_only=False)
    seed: int
    batch_size: int
    """Samples per optimizer step over all ranks and accumulation steps."""
    image_px: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    small: Literal["upscale", "error"] = "upscale"
    """What to do with pictures smaller than `image_px`."""
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    workers: int = 0
    """Worker processes, at most one per usable core; 0 decodes in this process."""
    bad: dict[str, str] = field(default_factory=dict, init=False)
    """Reasons of the samples set aside so far by this rank, by id, in order of appearance."""

    def __post_init__(self) -> None:
        self.share = Share(self.batch_size, self.rank, self.world_size, self.accumulation)
        self.share.refuse_too_few(len(self.source))
        self._samples = _Samples(
            self.source, self.image_px, self.seed, self.crop, self.flip, self.small
        )

    def batches(self, cursor: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches for ever, in order, `accumulation` of them per step.

        Workers live until the iterator is closed or collected, and read ahead two batches each.

        Args:
            cursor: samples consumed so far by all ranks together; a resumed run gives the number
                it had reached and sees what an uninterrupted one would have seen.

        Raises:
            LdmError: code BAD_DATA if no sample of the data set can be used.
        """
        order = micro_batches(self.share, cursor, len(self.source), self.seed)
        workers = usable_workers(self.workers)
        loader = DataLoader(
            self._samples,
            batch_sampler=_Endless(order),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_parent if workers else None,
            generator=torch.Generator(),  # or torch would draw from the global stream here
        )
        idle = 0
        for batch, reasons in loader:
            for sample_id, reason in reasons.items():
                self.bad.setdefault(sample_id, reason)
            idle = 0 if batch.weight.any() else idle + len(batch.ids)
            if idle * self.world_size >= len(self.source):  # a whole epoch without a good sample
                self._require_a_good_sample()
                idle = 0
            yield batch

    def _require_a_good_sample(self) -> None:
        """Looks at all samples, since this rank saw only its own: every rank concludes alike."""
        for index in range(len(self.source)):
            if self._samples[Place(0, index, 0)].reason is None:
                return
        reason = next(iter(self.bad.values()))
        raise LdmError(
            f"none of the {len(self.source)} samples can be used; the first reason was: {reason}",
            where="data.path",
            fix="repair the data set",
            code=ExitCode.BAD_DATA,
        )


def usable_workers(wanted: int) -> int:
    """`wanted` worker processes, but no more than cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(wanted, cores)


class _Sample(NamedTuple):
    """A fitted example, or the reason why there is none."""

    id: str
    caption: str
    pixels: Tensor  # (3, px, px)
    place: Place
    reason: str | None
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class _Samples(Dataset[_Sample]):
    """Places in, fitted samples out; runs in the worker processes."""

    source: Source
    image_px: int
    seed: int
    crop: Literal["center", "random"]
    flip: bool
    small: Literal["upscale", "error"]

    def __getitem__(self, place: Place) -> _Sample:
        sample_id = self.source.ids[place.sample]
        draws = Draws(self.seed, place.epoch, sample_id)
        try:
            example = self.source[place.sample]
            pixels = fit(
                example.pixels,
                self.image_px,
                draws=draws,
                crop=self.crop,
                flip=self.flip,
                small=self.small,
            )
        except LdmError as error:
            if error.code != ExitCode.BAD_DATA:
                raise
            px = self.image_px
            neutral, whole = torch.zeros(3, px, px), (px, px, 0, 0, px, px)  # mid-grey
            return _Sample(sample_id, "", neutral, place, str(error).partition("\n")[0], whole)
        height, width = example.pixels.shape[:2]
        mirrored = self.flip and is_mirrored(draws)
        sizes = sizes_of(
            height, width, self.image_px, draws=draws, crop=self.crop, mirrored=mirrored
        )
        return _Sample(sample_id, example.caption, pixels, place, None, sizes)


class _Endless:
    """An iterator dressed as a batch sampler, which DataLoader iterates once."""

    def __init__(self, order: Iterator[list[Place]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[Place]]:
        return self.order


def _collate(samples: Sequence[_Sample]) -> tuple[Batch, dict[str, str]]:
    """A batch and the reasons of its bad samples, which travel together out of the worker."""
    reasons = {sample.id: sample.reason for sample in samples if sample.reason is not None}
    batch = Batch(
        ids=tuple(sample.id for sample in samples),
        weight=torch.tensor([float(sample.reason is None) for sample in samples]),
        epochs=tuple(sample.place.epoch for sample in samples),
        positions=tuple(sample.place.position for sample in samples),
        pixels=torch.stack([sample.pixels for sample in samples]),
        captions=tuple(sample.caption for sample in samples),
        sizes=torch.tensor([sample.sizes for sample in samples], dtype=torch.float32),
    )
    return batch, reasons


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The training process decides
    # what to do with them, and needs its workers until it has finished the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
