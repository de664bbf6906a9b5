"""Training runs: one run is one function of its configuration, however it is interrupted or cut."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recipes import QUICK, ROOT, TINY, assert_bitwise_equal, state, tiny

from ldm.errors import ExitCode, LdmError
from ldm.training.diffusion import drop_captions, train_diffusion
from ldm.training.session import Meter, Progress, Session, resolve_precision
from ldm.training.vae import train_vae
from ldm.training.vae_checkpoints import VaeWriter
from ldm.types import TextEmbedding


def train(config):
    return train_vae(config) if config.stage == "vae" else train_diffusion(config)


def test_dropped_captions_are_the_null_embedding():
    """Row for row, also where the empty caption has another length than the captions."""
    text = TextEmbedding(torch.arange(12.0).reshape(3, 2, 2), torch.ones(3, 2, dtype=torch.bool))
    null = TextEmbedding(torch.full((1, 1, 2), -1.0), torch.ones(1, 1, dtype=torch.bool))
    kept = drop_captions(text, null, torch.tensor([False, True, False]))
    assert torch.equal(kept.tokens[[0, 2]], text.tokens[[0, 2]])
    assert kept.tokens[1].tolist() == [[-1, -1], [0, 0]]
    assert kept.mask.tolist() == [[True, True], [True, False], [True, True]]


def stop_after(monkeypatch, steps):
    """A signal is heard in step `steps` of this process."""
    seen = iter(range(1, 10_000))
    monkeypatch.setattr(Session, "stopping", lambda self: next(seen) == steps)


@pytest.mark.parametrize("name", ["vae", "dit", "mmdit", "unet"])
def test_a_run_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one(
    name, tmp_path, monkeypatch
):
    whole = train(tiny(name, tmp_path / "whole"))
    for stop in (1, 3):
        config = tiny(name, tmp_path / f"stopped{stop}")
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(LdmError) as caught:
                train(config)
        assert caught.value.code == ExitCode.SIGNALLED
        assert (tmp_path / f"stopped{stop}" / f"step-{stop:08d}").is_dir(), "no step is lost"
        assert_bitwise_equal(train(config), whole)


def test_the_metrics_of_a_resumed_run_have_every_step_once(tmp_path, monkeypatch):
    config = tiny("dit", tmp_path / "run", "run.save_every_steps=4")
    with monkeypatch.context() as patch:
        calls = iter([False] * 4)  # the fifth step finds nothing to read: a power cut
        patch.setattr(Session, "stopping", lambda self: next(calls))
        with pytest.raises(StopIteration):
            train(config)
    train(config)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_cached_and_live_training_are_the_same_run(tmp_path):
    exact = "train.precision=fp32"  # bf16 rounds by more than the bound below
    cached = train(tiny("dit", tmp_path / "cached", exact))
    live = train(tiny("dit", tmp_path / "live", exact, "cache.enabled=false"))
    one, two = state(cached), state(live)
    assert one.keys() == two.keys()
    for key in one:  # captions of a live batch are padded to its own longest: other sum orders
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_accumulation_does_not_change_the_run(tmp_path):
    whole = state(train(tiny("dit", tmp_path / "one", "train.precision=fp32")))
    parts = state(
        train(tiny("dit", tmp_path / "four", "train.precision=fp32", "train.accumulation=4"))
    )
    for key in whole:  # sums in another order; Adam amplifies tiny gradients, hence the bound
        torch.testing.assert_close(whole[key], parts[key], rtol=1e-3, atol=2e-4)


def test_another_seed_is_another_run(tmp_path):
    one = state(train(tiny("dit", tmp_path / "a")))
    two = state(train(tiny("dit", tmp_path / "b", "train.seed=1")))
    key = "transformer/diffusion_pytorch_model.safetensors:proj_out.weight"
    assert not one[key].equal(two[key])


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(tmp_path, monkeypatch):
    import ldm.training.diffusion as module

    real, calls = module.diffusion_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(module, "diffusion_loss", poisoned)
    last = train(tiny("dit", tmp_path / "run"))
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert all(value.isfinite().all() for value in state(last).values())


def test_a_run_of_bad_steps_stops_with_the_numerics_code_and_good_weights(tmp_path, monkeypatch):
    import ldm.training.diffusion as module

    real, calls = module.diffusion_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("inf") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(module, "diffusion_loss", poisoned)
    with pytest.raises(LdmError, match="3 steps in a row") as caught:
        train(tiny("dit", tmp_path / "run"))
    assert caught.value.code == ExitCode.NUMERICS
    last = tmp_path / "run/step-00000002"
    assert all(value.isfinite().all() for value in state(last).values())


def test_a_changed_experiment_is_refused_under_resume(tmp_path):
    train(tiny("dit", tmp_path / "run"))
    with pytest.raises(LdmError, match=r"model.num_layers: 2 -> 3") as caught:
        train(tiny("dit", tmp_path / "run", "model.num_layers=3"))
    assert caught.value.code == ExitCode.CONFIG


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path):
    config = tiny("dit", tmp_path / "run")
    train(config)
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    for folder in (tmp_path / "run").glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(LdmError, match="holds none") as caught:
        train(config)
    assert caught.value.code == ExitCode.IO
    assert (tmp_path / "run/metrics.jsonl").read_text() == rows, "nothing is lost"


@pytest.mark.parametrize("text", [None, "", "stage: diffusion"])
def test_what_a_run_was_is_read_from_its_checkpoint(tmp_path, text):
    train(tiny("dit", tmp_path / "run"))
    (tmp_path / "run/config.yaml").unlink()
    if text is not None:
        (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(LdmError, match="caption_dropout") as caught:
        train(tiny("dit", tmp_path / "run", "diffusion.caption_dropout=0.5", "train.steps=8"))
    assert caught.value.code == ExitCode.CONFIG
    train(tiny("dit", tmp_path / "run", "train.steps=8"))
    assert "caption_dropout" in (tmp_path / "run/config.yaml").read_text()


def test_a_preview_prompt_that_is_too_long_is_refused_before_the_first_step(tmp_path):
    long = "preview.prompts=[" + "red " * 100 + "]"
    with pytest.raises(LdmError, match="tokens"):
        train(tiny("dit", tmp_path / "run", long, "preview.every_steps=5"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_killed_after_its_last_preview_has_that_preview(tmp_path, monkeypatch):
    config = tiny("vae", tmp_path / "run", "preview.every_steps=6", "data.holdout=4")
    with monkeypatch.context() as patch:
        patch.setattr(VaeWriter, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Session, "due", lambda self, step, every: every and step == 6)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "heldout_psnr" in row] == [6]


def test_a_slice_of_time_without_samples_has_no_mean_on_any_rank():
    meter = Meter()
    meter.add({"loss": 2.0, "loss_t0.00": math.nan, "loss_t0.25": 4.0})
    meter.add({"loss": 4.0, "loss_t0.00": math.nan, "loss_t0.25": math.nan})
    row = meter.take(4, over_ranks=lambda numbers: [2 * n for n in numbers])  # two equal ranks
    assert "loss_t0.00" not in row
    assert (row["loss"], row["loss_t0.25"]) == (3.0, 4.0)


def test_a_damaged_newest_checkpoint_is_skipped_loudly_and_the_run_still_ends_equal(
    tmp_path, caplog
):
    whole = train(tiny("dit", tmp_path / "whole"))
    config = tiny("dit", tmp_path / "run")
    newest = train(config)
    victim = newest / "transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 0x10
    victim.write_bytes(bytes(data))
    again = train(config)
    assert "diffusion_pytorch_model.safetensors" in caplog.text
    assert_bitwise_equal(again, whole)


def test_only_the_configured_number_of_checkpoints_stays(tmp_path):
    train(tiny("dit", tmp_path / "run", "run.keep_checkpoints=1"))
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-00000006"]


def test_an_indivisible_batch_is_refused_with_legal_values(tmp_path):
    with pytest.raises(LdmError, match="cannot be split"):
        tiny("dit", tmp_path / "run", "train.accumulation=3")


def test_automatic_precision_is_bf16_only_where_the_processor_multiplies_it():
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        in_hardware = {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split())
        expected = "bf16" if in_hardware else "fp32"
        assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert Progress().precision == ""


def command(name, run_dir, *extra):
    script = ROOT / ("train_vae.py" if name == "vae" else "train_diffusion.py")
    cache = [] if name == "vae" else [f"cache.dir={run_dir}-cache"]
    return [
        str(script),
        "--config",
        str(TINY[name]),
        f"run.dir={run_dir}",
        *QUICK,
        *cache,
        *extra,
    ]


def start(name, run_dir, *extra):
    return subprocess.Popen(
        [sys.executable, *command(name, run_dir, *extra)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.01)


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGKILL"])
def test_a_real_process_that_is_signalled_loses_nothing(signal_name, tmp_path):
    longer = ("train.steps=60", "run.save_every_steps=10")
    process = start("dit", tmp_path / "run", *longer)
    wait_for(tmp_path / "run" / "step-00000010")
    process.send_signal(getattr(signal, signal_name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (75 if signal_name == "SIGTERM" else -9), errors
    if signal_name == "SIGTERM":
        assert "run the same command again" in errors
        assert "Traceback" not in errors
    for folder in ("run", "whole"):
        done = start("dit", tmp_path / folder, *longer)
        _, errors = done.communicate(timeout=200)
        assert done.returncode == 0, errors
    assert_bitwise_equal(tmp_path / "run/step-00000060", tmp_path / "whole/step-00000060")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["vae", "dit", "unet"])
def test_twelve_random_kills_change_nothing(name, tmp_path):
    import random

    longer = ("train.steps=80", "run.save_every_steps=5")
    done = start(name, tmp_path / "whole", *longer)
    begun = time.monotonic()
    done.communicate(timeout=300)
    assert done.returncode == 0
    duration, draw = time.monotonic() - begun, random.Random(0)
    for _ in range(12):
        process = start(name, tmp_path / "run", *longer)
        time.sleep(draw.uniform(0.3, 1.0) * duration)
        process.kill()
        process.communicate()
    done = start(name, tmp_path / "run", *longer)
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    assert_bitwise_equal(tmp_path / "run/step-00000080", tmp_path / "whole/step-00000080")


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29711"],
        pytest.param(
            [
                "-m",
                "accelerate.commands.launch",
                "--cpu",
                "--num_processes",
                "1",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torchrun-2-ranks", "accelerate"],
)
@pytest.mark.parametrize("name", ["dit", pytest.param("vae", marks=pytest.mark.slow)])
def test_launchers_and_ranks_give_the_run_of_one_process(launcher, name, tmp_path):
    exact = ("train.precision=fp32",)
    done = subprocess.run(
        [sys.executable, *launcher, *command(name, tmp_path / "many", *exact)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = state(train(tiny(name, tmp_path / "one", *exact)))
    many = state(tmp_path / "many/step-00000006")
    assert one.keys() == many.keys()
    for key in one:  # gradients are summed in another order, which Adam amplifies near zero
        torch.testing.assert_close(one[key], many[key], rtol=1e-3, atol=2e-4)
