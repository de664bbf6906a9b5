"""What both training loops share around their mathematics: processes, signals, the optimizer step.

A session owns the Accelerator, the stop flag, and the metrics of one process. It draws nothing and
knows nothing of what is trained.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm import storage
from ldm.checkpoint import agree
from ldm.config.files import dump
from ldm.config.schema import Experiment
from ldm.data.loader import Share
from ldm.errors import ExitCode, LdmError
from ldm.models.backends import Backends
from ldm.training.kernels import choose_backends
from ldm.training.optim import clip_gradients

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run is; everything else about its position follows from this."""

    step: int = 0
    """Optimizer steps done."""
    cursor: int = 0
    """Samples consumed by all ranks together."""
    skipped: int = 0
    """Steps whose gradient was not finite and which changed no weight."""
    data: str = ""
    """Fingerprint of the training data."""
    precision: str = ""
    """What `train.precision` came to where the run began; kept on other machines."""
    cpu_kernels: str = "plain"
    """What `train.cpu_kernels` came to; runs of earlier versions had torch's own."""
    skipped_in_a_row: int = 0
    """The latest of these, without a good step between."""


@dataclass(frozen=True)
class Update:
    """One network's part of an optimizer step, its gradients ready."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float
    clip_norm: float


class StopFlag:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag; a second signal stops at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers are installed inside and the former ones restored afterwards."""
        names = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]
        if threading.current_thread() is not threading.main_thread():
            names = []  # Python lets only the main thread install handlers
        former = {n: signal.signal(getattr(signal, n), self._heard) for n in names}
        try:
            yield
        finally:
            for name, handler in former.items():
                signal.signal(getattr(signal, name), handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            sys.stderr.write("second signal: stopping at once; the last checkpoint is intact\n")
            sys.exit(ExitCode.SIGNALLED)
        self.name = signal.Signals(number).name


class Session:
    """One process of a run.

    Args:
        config: the experiment.
    """

    def __init__(self, config: Experiment) -> None:
        from accelerate import Accelerator

        self.config = config
        # autocast is ours (`autocast` below): one precision setting, the configuration's.
        # cpu: without it Accelerate overlooks that torchrun started several CPU processes
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.accelerator.is_available()
        )
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        assert self.accelerator.num_processes == asked, "the launcher's ranks do not see each other"
        self.device: torch.device = self.accelerator.device
        self.precision: str = resolve_precision(config.train.precision, self.device)
        self.is_main: bool = self.accelerator.is_main_process
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.run_dir = Path(config.run.dir)
        self.stop, self.bad_named, self.samples = StopFlag(), 0, 0
        self.metrics = Metrics(
            self.run_dir, is_main=self.is_main, tensorboard=config.run.tensorboard
        )
        self.share = Share(
            config.train.batch_size, self.rank, self.world_size, config.train.accumulation
        )
        self.backends: Backends = choose_backends(self, config.train.cpu_kernels)

    def autocast(self) -> torch.autocast:
        """The context in which networks run: bf16 products, or plain fp32."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def any_rank(self, value: bool) -> bool:
        """True on all ranks as soon as `value` is true on one."""
        if self.world_size == 1:
            return value
        flag = torch.tensor([float(value)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank, on every rank; all must have as many."""
        if self.world_size == 1:
            return rows
        gathered: Tensor = self.accelerator.gather(rows.to(self.device))
        return gathered

    def summed(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, the same on every rank."""
        if self.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def on_main(self, what: Any) -> None:
        """Runs `what()` on the main process; its error is raised on every rank alike.

        Without this exchange the other ranks would wait for ever in their next collective.
        """
        error: Exception | None = None
        if self.is_main:
            try:
                what()
            except Exception as caught:  # raised again by `agree`, on all ranks
                error = caught
        agree(error)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The run directory is ours inside: locked and tidied."""
        with ExitStack() as stack:
            stack.enter_context(self.backends.keeping_memory())
            self.on_main(lambda: self._open(stack))
            stack.callback(self.metrics.close)
            yield

    def _open(self, stack: ExitStack) -> None:
        storage.make_directory(self.run_dir)
        stack.enter_context(storage.claim(self.run_dir))
        storage.clean_leftovers(self.run_dir)

    @property
    def resolved(self) -> str:
        """The resolved configuration as YAML."""
        return dump(self.config)

    def write_config(self) -> None:
        """Writes the resolved configuration into the run directory."""
        self.on_main(lambda: storage.write_text(self.run_dir / "config.yaml", self.resolved))

    def prepare(self, model: Any) -> nn.Module:
        """The model wrapped for distribution; alone, the model itself."""
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens `every` steps happens now; the last step always counts."""
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def report(
        self,
        progress: Progress,
        meter: Meter,
        bad: Mapping[str, str],
        bar: Any,
        *,
        cached: bool = False,
    ) -> None:
        """One row of metrics, over all ranks, and the loss on the progress bar.

        Raises:
            LdmError: code BAD_DATA when more samples were set aside than may be.
        """
        values = meter.take(self.config.train.batch_size, self._sum_over_ranks)
        for name in list(bad)[self.bad_named :]:
            log.warning("set aside: %s", bad[name] if name in bad[name] else f"{name}: {bad[name]}")
        self.bad_named, count = len(bad), len(bad)
        if not cached:
            count = int(self._sum_over_ranks([float(count)])[0])
        refuse_too_many_bad(bad, count, self.samples, self.config.data.max_bad_fraction)
        if not self.is_main:
            return
        values |= {"skipped_steps": progress.skipped, "bad_samples": count}
        self.metrics.write(progress.step, values)
        bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", refresh=False)

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.world_size == 1:
            return values
        sums: list[float] = self.summed(torch.tensor(values, device=self.device)).tolist()
        return sums

    def stopping(self) -> bool:
        """Whether any rank heard a signal."""
        return self.any_rank(self.stop.name is not None)

    def stopped(self, progress: Progress) -> LdmError:
        """The end of a run that a signal stopped after saving."""
        return LdmError(
            f"stopped by {self.stop.name or 'a signal to another rank'} and saved",
            where=f"step {progress.step}",
            fix="run the same command again to continue",
            code=ExitCode.SIGNALLED,
        )

    def micro_batch_context(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged between ranks in the last micro-batch of a step only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, progress: Progress
    ) -> float | None:
        """`optimizer_steps` of a run that trains one network; its norm."""
        update = Update(model, optimizer, rate, self.config.optim.clip_norm)
        norms = self.optimizer_steps([update], progress)
        return None if norms is None else norms[0]

    def optimizer_steps(
        self, updates: Sequence[Update], progress: Progress
    ) -> tuple[float, ...] | None:
        """Clips and applies the gradients; a step that is not finite changes nothing.

        Networks that train together step together or not at all: what made one of them not finite
        has gone through the other. Gradients were averaged over ranks, so a non-finite value on one
        rank is seen by all.

        Returns:
            the gradient norms before clipping, or None when the step was skipped.

        Raises:
            LdmError: code NUMERICS after `train.max_bad_steps` skipped steps in a row.
        """
        for update in updates:
            for group in update.optimizer.param_groups:
                group["lr"] = update.rate
        # waits for the device, before every step
        values = tuple(clip_gradients(update.model, update.clip_norm) for update in updates)
        if finite := all(_isfinite(value) for value in values):
            for update in updates:
                update.optimizer.step()
            progress.skipped_in_a_row = 0
        else:
            self._skip([update.model for update in updates], values, progress)
        for update in updates:
            update.optimizer.zero_grad(set_to_none=True)
        return values if finite else None

    def _skip(
        self, models: Sequence[nn.Module], norms: tuple[float, ...], progress: Progress
    ) -> None:
        """Counts a step without finite gradients; too many in a row end the run."""
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        shown = ", ".join(f"{norm:g}" for norm in norms)
        log.warning("step %d: gradient norm is %s; step skipped", progress.step, shown)
        if progress.skipped_in_a_row < self.config.train.max_bad_steps:
            return
        named = (pair for model in models for pair in model.named_parameters())
        bad = [name for name, parameter in named if not _all_finite(parameter.grad)]
        raise LdmError(
            f"{progress.skipped_in_a_row} steps in a row had no finite gradient "
            f"(first bad parameter: {bad[0] if bad else 'none, the loss overflowed'})",
            where=f"step {progress.step}",
            fix="lower optim.learning_rate, or set train.precision=fp32; the weights "
            "and the last checkpoint are good",
            code=ExitCode.NUMERICS,
        )


def refuse_too_many_bad(bad: Mapping[str, str], count: int, total: int, allowed: float) -> None:
    """Stops with code BAD_DATA when `count` of `total` samples is more than the allowed share."""
    if count > allowed * total:
        first = "; ".join(list(bad)[:5])
        raise LdmError(
            f"{count} of {total} pictures cannot be used, more than "
            f"data.max_bad_fraction={allowed}: {first}",
            where="data",
            fix="mend or remove these files, or raise data.max_bad_fraction",
            code=ExitCode.BAD_DATA,
        )


def resolve_precision(
    wanted: Literal["auto", "fp32", "bf16"], device: torch.device
) -> Literal["fp32", "bf16"]:
    """fp32 or bf16: `auto` takes bf16 only where the device multiplies it in hardware.

    On a CPU without such instructions bf16 is emulated, ten times slower than fp32.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and in_hardware else "fp32"


class Metrics:
    """metrics.jsonl, one row per logged step, and TensorBoard beside it."""

    def __init__(self, run_dir: Path, *, is_main: bool, tensorboard: bool) -> None:
        self.path, self.run_dir = run_dir / "metrics.jsonl", run_dir
        self.is_main, self.tensorboard = is_main, tensorboard
        self.writer: Any = None

    def start(self, step: int) -> None:
        """Starts writing after `step`: rows of steps that will be made again are dropped."""
        if not self.is_main:
            return
        storage.truncate_metrics(self.path, step)
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                log.info("TensorBoard is not installed; metrics.jsonl is written all the same")
                return
            self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; `values` are rounded to six digits in the file."""
        row = {"step": step, **{key: float(f"{value:.6g}") for key, value in values.items()}}
        storage.append_line(self.path, json.dumps(row))
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes what is pending."""
        if self.writer is not None:
            self.writer.close()


class Meter:
    """Means over the steps since the last log row, without waiting for the device in between."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, Tensor | float] = {}
        self.steps, self.started = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor | float]) -> None:
        """Adds one step's values."""
        self.steps += 1
        for key, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            known = ~value.isnan()  # NaN stands for "nothing to average in this step"
            self.sums[key] = self.sums.get(key, 0.0) + value.nan_to_num(nan=0.0)
            self.counts[key] = self.counts.get(key, 0.0) + known

    def take(
        self, batch_size: int, over_ranks: Callable[[list[float]], list[float]] = list
    ) -> dict[str, float]:
        """The means and the throughput since the last call; a value never given has no mean.

        Args:
            batch_size: samples per step over all ranks.
            over_ranks: adds up numbers over all ranks.
        """
        elapsed = time.perf_counter() - self.started
        names = list(self.sums)
        numbers = over_ranks([float(row[n]) for row in (self.sums, self.counts) for n in names])
        pairs = zip(names, numbers[: len(names)], numbers[len(names) :], strict=True)
        means = {name: total / count for name, total, count in pairs if count}
        means["images_per_second"] = self.steps * batch_size / max(elapsed, 1e-9)
        self.sums, self.counts, self.steps = {}, {}, 0
        self.started = time.perf_counter()
        return means


def _isfinite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _all_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())
