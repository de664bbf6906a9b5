"""`ldm demo`: the whole path on data that the project draws itself, with a report at the end.

Each stage runs in a process of its own through the same commands a user would type, so the demo
shows nothing that the scripts cannot do. The length of each is planned once, from the speed of the
machine, and written down: killing the demo and starting it again continues the same plan.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ldm import __version__, storage
from ldm.config.files import load
from ldm.config.schema import ClipExperiment, DiffusionExperiment, VaeExperiment
from ldm.errors import ExitCode, LdmError

STAGES = (
    ("vae", "train-vae", "KL-VAE: pictures to latents and back"),
    ("clip", "train-clip", "CLIP: captions to embeddings"),
    ("dit", "train-diffusion", "DiT: noise to latents that follow a caption"),
)
TOTAL = 690.0
"""Seconds that everything should take together; what the other stages leave is the denoiser's."""
SECONDS = {"vae": 165.0, "clip": 10.0}
"""Seconds of optimizer steps that a stage is planned for."""
AROUND = 55.0
"""Seconds of the last stages that are not optimizer steps: starting, the cache, drawing."""
OVERHEAD = 1.1
"""Seconds of the denoiser's stage per second of its bare optimizer steps: reading, logging."""
PLAN = "demo-plan.json"
BUSY = 0.7
"""Load of the last minute above which the plan is said to depend on it."""
PICTURES = 250
"""Held-out captions that are drawn and measured."""
CLOCK = "demo-seconds.json"
"""Time spent per stage, so that a demo that was interrupted still reports all of it."""


def run_demo(configs: Path, overrides: Sequence[str] = ()) -> None:
    """Trains VAE, CLIP and DiT, draws held-out captions, and writes report.json and pictures.

    Args:
        configs: folder with vae.yaml, clip.yaml and dit.yaml.
        overrides: `stage.key=value` changes, for example `dit.train.steps=100`.
    """
    given = {name: _changes(name, overrides) for name, _, _ in STAGES}
    files = {name: str(configs / f"{name}.yaml") for name, _, _ in STAGES}
    dit: DiffusionExperiment = load([files["dit"]], given["dit"], stage="diffusion")
    vae: VaeExperiment = load([files["vae"]], given["vae"], stage="vae")
    clip: ClipExperiment = load([files["clip"]], given["clip"], stage="clip")
    run_dir = Path(dit.run.dir)
    seconds = _seconds(run_dir)
    for number, (name, command, what) in enumerate(STAGES, start=1):
        print(f"\n[{number}/{len(STAGES) + 1}] {what}", flush=True)
        started = time.perf_counter()
        try:
            if not any(text.startswith("train.steps=") for text in given[name]):
                steps = _plan(name, vae, clip, dit, sum(seconds.values()))
                given[name].append(f"train.steps={steps}")
            _run(command, "--config", files[name], *given[name])
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            storage.make_directory(run_dir)
            storage.write_json(run_dir / CLOCK, seconds)
    print(f"\n[{len(STAGES) + 1}/{len(STAGES) + 1}] drawing and measuring held-out captions")
    started = time.perf_counter()
    result, psnr = _measure(dit, vae)
    seconds["evaluation"] = time.perf_counter() - started
    _report(run_dir, result, psnr, seconds)
    _plot(run_dir, Path(vae.run.dir))


def _plan(
    name: str, vae: VaeExperiment, clip: ClipExperiment, dit: DiffusionExperiment, spent: float
) -> int:
    """Optimizer steps of a stage: as many as fit here, at most those of its recipe.

    Measured once, when the stage begins, and written down, so that a demo which is started again
    goes on with the same plan; a change of what decides the speed makes another.

    Args:
        name: vae, clip or dit.
        vae, clip, dit: the three recipes.
        spent: seconds that the demo has taken so far.
    """
    from ldm.training.probe import clip_step_seconds, dit_step_seconds, vae_step_seconds

    config: VaeExperiment | ClipExperiment | DiffusionExperiment
    config = vae if name == "vae" else clip if name == "clip" else dit
    more: dict[str, list[Any]] = {
        "vae": [vae.crop.model_dump(mode="json")],
        "clip": [],
        "dit": [vae.model.latent_channels, clip.model.width],
    }
    measure: dict[str, Callable[[], float]] = {
        "vae": lambda: vae_step_seconds(vae),
        "clip": lambda: clip_step_seconds(clip),
        "dit": lambda: dit_step_seconds(dit, vae, clip),
    }
    model, train = config.model.model_dump(mode="json"), config.train
    decides = [model, train.batch_size, train.precision, config.data.image_px, *more[name]]
    path = Path(dit.run.dir) / PLAN
    plan: dict[str, Any] = storage.read_json(path) if path.exists() else {}
    if name not in plan or plan[name]["measured_for"] != decides:
        if (busy := _busy()) > BUSY and not plan:
            print(f"  load of the last minute: {busy:.1f}; what runs beside the demo shortens it")
        step = measure[name]()
        budget = SECONDS.get(name, (TOTAL - spent - AROUND) / OVERHEAD)
        least = max(20, 2 * config.optim.warmup_steps)  # on the slowest machine, too
        fits = max(least, int(budget / step) // 10 * 10)
        plan[name] = {"measured_for": decides, "step_seconds": step, "fits": fits}
        storage.make_directory(path.parent)
        storage.write_json(path, plan)
    steps: int = min(train.steps, plan[name]["fits"])
    print(f"  {plan[name]['step_seconds'] * 1e3:.0f} ms a step here: {steps} steps", flush=True)
    return steps


def _busy() -> float:
    """Programs that wanted a core over the last minute, 0 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _measure(dit: DiffusionExperiment, vae: VaeExperiment) -> tuple[Any, float]:
    from ldm.evaluation.report import measure
    from ldm.inference.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(dit.run.dir)
    result = measure(pipeline, count=PICTURES, split="val")
    rows = storage.read_lines(Path(vae.run.dir) / "metrics.jsonl")
    found = [row["heldout_psnr"] for row in map(json.loads, rows) if "heldout_psnr" in row]
    if not found:
        raise LdmError(
            "the VAE run has measured no held-out reconstruction",
            where=vae.run.dir,
            fix="set preview.every_steps above 0 in vae.yaml",
            code=ExitCode.CONFIG,
        )
    return result, found[-1]


def _report(run_dir: Path, result: Any, psnr: float, seconds: dict[str, float]) -> None:
    from ldm.evaluation.report import as_json, save_sheet, table

    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    total, memory = sum(seconds.values()), max(own, children) * unit / 1e9
    facts = {
        "version": __version__,
        **as_json(result),
        "vae": {"psnr": psnr},
        "seconds": round(total, 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_gb": round(memory, 2),
    }
    storage.write_json(run_dir / "report.json", facts)
    save_sheet(result, run_dir / "grid.png")
    print(f"\n{table(result)}")
    print(f"\nVAE reconstruction {psnr:.1f} dB, {total / 60:.1f} minutes, {memory:.1f} GB at most")
    print(f"written: {run_dir}/report.json, grid.png, curves.png")
    print(f'next: ldm infer --model {run_dir} --prompt "a large red circle on a white background"')


def _plot(run_dir: Path, vae_dir: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, folder, key, title in (
        (axes[0], vae_dir, "reconstruction", "VAE: reconstruction error"),
        (axes[1], run_dir, "loss", "DiT: flow-matching loss"),
    ):
        rows = [json.loads(line) for line in storage.read_lines(folder / "metrics.jsonl")]
        rows = [row for row in rows if key in row]
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set(title=title, xlabel="optimizer step", yscale="log")
        axis.grid(alpha=0.3)
    storage.write_file(
        run_dir / "curves.png", lambda path: figure.savefig(path, format="png", dpi=110)
    )
    pyplot.close(figure)


def _run(*arguments: str) -> None:
    """Runs a stage; signals go on to it, so that it saves before it stops."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm.cli", *arguments],
        start_new_session=True,  # Ctrl-C reaches it once, through `forward`
        preexec_fn=_end_with_parent,
    )
    heard: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        process.send_signal(signal.SIGTERM)  # of all of them: save, then stop

    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    former = {n: signal.signal(n, forward) for n in names}
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if code or heard:
        known = ExitCode(code) if code in set(ExitCode) else ExitCode.BUG
        raise LdmError(
            f"`ldm {' '.join(arguments[:3])}` ended with exit code {code}",
            where="demo",
            fix="see its message above; the same command continues where it stopped",
            code=ExitCode.SIGNALLED if heard else known,
        )


def _end_with_parent() -> None:
    """In a stage: it ends with a demo that is killed, which can then be started again at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of <linux/prctl.h>


def _changes(stage: str, overrides: Sequence[str]) -> list[str]:
    for text in overrides:
        if text.split(".", 1)[0] not in {name for name, _, _ in STAGES}:
            raise LdmError(
                f"{text!r} names no stage of the demo",
                where="command line",
                fix="write vae.KEY=VALUE, clip.KEY=VALUE or dit.KEY=VALUE",
                code=ExitCode.CONFIG,
            )
    return [text.split(".", 1)[1] for text in overrides if text.startswith(f"{stage}.")]


def _seconds(run_dir: Path) -> dict[str, float]:
    path = run_dir / CLOCK
    return dict(storage.read_json(path)) if path.exists() else {}
