"""Measures every row of docs/benchmarks.md on this machine: `make benchmark`, or one group of it.

    python -m benchmarks [--only unet dit ...] [--smoke] [--page]

Writes benchmarks/results/latest.json after every group, so that a stopped run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads

import torch

import ldm
from benchmarks import feeding, networks, page, sampling, startup, training
from benchmarks.measure import SMOKE, Budget, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Group = Callable[[Budget], Iterator[Row]]

GROUPS: dict[str, Group] = {
    "startup": startup.startup,
    "samplers": sampling.samplers,
    "optimizer": training.optimizer,
    "cached": feeding.cached,
    "jpeg": feeding.jpeg,
    "dispatch": networks.dispatch,
    "vae": networks.vae,
    "unet": networks.unet,
    "dit": networks.dit,
    "mmdit": networks.mmdit,
    "sampling": sampling.sampling,
    "steps": training.steps,
    "trainer": training.trainer,
    "compiled": networks.compiled,
}


def run(names: list[str], budget: Budget, out: Path) -> list[dict[str, Any]]:
    """Measures groups and writes their rows; rows of other groups in the file stay."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    found = json.loads(out.read_text())["rows"] if out.is_file() else []
    for name in names:
        began = time.perf_counter()
        rows = [{"group": name, **asdict(row)} for row in GROUPS[name](budget)]
        found = [row for row in found if row["group"] != name] + rows
        found.sort(key=lambda row: list(GROUPS).index(row["group"]))
        document = {"rows": found, **circumstances()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        for row in rows:
            print(page.line(row), flush=True)
        print(f"  {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return found


def circumstances() -> dict[str, Any]:
    """Hardware, versions and commit, for the file and the page."""
    import diffusers

    called = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    model = [line.split(":")[1] for line in _cpuinfo() if line.startswith("model name")]
    return {
        "hardware": f"{(model or [platform.processor()])[0].strip()}, one core",
        "commit": called.stdout.strip() or "unknown",
        "versions": {
            "ldm": ldm.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    """Measures, and writes the page when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: times mean nothing")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md and its plot")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(args.only, SMOKE if args.smoke else Budget(), args.out)
    if args.page:
        page.write(json.loads(args.out.read_text()), ROOT / "docs")


if __name__ == "__main__":
    main()
