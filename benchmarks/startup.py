"""Rows of processes: `ldm --help`, and from start to ready to draw, against the peer's imports."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Budget, Row

ROOT = Path(__file__).parent.parent
HELP = "import ldm.cli, sys; sys.argv = ['ldm', '--help']; ldm.cli.main()"
READY = "import ldm; from ldm.inference.pipeline import Pipeline"
PEER = "import ldm; from diffusers import StableDiffusionPipeline"
LIMIT_S = 0.35


def startup(budget: Budget) -> Iterator[Row]:
    """CPU seconds of whole processes, in turns."""
    turns = 1 if budget.is_smoke else 7
    times: dict[str, list[float]] = {HELP: [], READY: [], PEER: []}
    for code in times:
        _seconds(code)  # compiles what is not compiled yet
    for _ in range(turns):
        for code, seconds in times.items():
            seconds.append(_seconds(code))
    help_s, ready_s, peer_s = (statistics.median(seconds) for seconds in times.values())
    yield Row(
        "ldm --help",
        f"limit {LIMIT_S} s",
        LIMIT_S / help_s,
        1.0,
        ours_ms=help_s * 1e3,
        note="limit over measured",
    )
    yield Row(
        "process start to pipeline",
        "importing StableDiffusionPipeline",
        peer_s / ready_s,
        2.5,
        ours_ms=ready_s * 1e3,
        peer_ms=peer_s * 1e3,
    )


def _seconds(code: str) -> float:
    """User and system time of a process that runs `code`."""
    began = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    ended = os.times()
    return ended.children_user + ended.children_system - began.children_user - began.children_system
