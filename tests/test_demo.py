"""The demo: a plan made once per machine, stages that end with it, a report at the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes import ROOT

from ldm import demo, storage
from ldm.config.files import load
from ldm.training import probe


@pytest.fixture
def measured(monkeypatch):
    """Which stages were measured; each takes 0.1 s a step."""
    names = []
    for name in ("vae", "clip", "dit"):
        monkeypatch.setattr(
            probe, f"{name}_step_seconds", lambda *_, name=name: names.append(name) or 0.1
        )
    return names


def recipes(**overrides):
    return [
        load([str(ROOT / f"configs/demo/{name}.yaml")], overrides.get(name, []))
        for name in ("vae", "clip", "dit")
    ]


def plans(tmp_path, **overrides):
    """The planned steps of the stages of a demo in `tmp_path`, the first two taking 300 s."""
    overrides["dit"] = [f"run.dir={tmp_path}", *overrides.get("dit", [])]
    spent = {"vae": 0.0, "clip": 250.0, "dit": 300.0}
    return {name: demo._plan(name, *recipes(**overrides), spent[name]) for name in spent}


def test_a_plan_fills_the_time_and_is_made_once(tmp_path, measured):
    steps = plans(tmp_path)
    left = demo.TOTAL - 300.0 - demo.AROUND
    expected = {**demo.SECONDS, "dit": left / demo.OVERHEAD}
    assert steps == {name: int(seconds / 0.1) // 10 * 10 for name, seconds in expected.items()}
    assert plans(tmp_path) == steps
    assert measured == ["vae", "clip", "dit"]


def test_only_what_decides_the_speed_of_a_stage_plans_it_again(tmp_path, measured):
    plans(tmp_path)
    plans(tmp_path, dit=["preview.count=4", "optim.learning_rate=0.1"])
    assert measured == ["vae", "clip", "dit"]
    plans(tmp_path, dit=["model.num_layers=4"])
    assert measured[3:] == ["dit"]


def test_a_recipe_with_fewer_steps_than_fit_is_not_stretched(tmp_path, measured):
    assert plans(tmp_path, vae=["train.steps=70"])["vae"] == 70


def test_a_demo_that_is_out_of_time_still_warms_up(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(demo, "TOTAL", 0.0)
    assert plans(tmp_path)["dit"] == 200  # twice the 100 steps of warm-up


def test_steps_that_the_user_asks_for_are_the_ones_that_run(tmp_path, measured, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_run", lambda *arguments: ran.append(arguments[-1]))
    monkeypatch.setattr(demo, "_measure", lambda *_: (None, 0.0))
    monkeypatch.setattr(demo, "_report", lambda *_: None)
    monkeypatch.setattr(demo, "_plot", lambda *_: None)
    demo.run_demo(ROOT / "configs/demo", ["clip.train.steps=5000"])
    assert ran[:2] == [f"train.steps={int(demo.SECONDS['vae'] / 0.1)}", "train.steps=5000"]
    assert measured == ["vae", "dit"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_stage_ends_with_a_demo_that_is_killed(tmp_path):
    script = (
        "import subprocess, sys, time; from ldm.demo import _end_with_parent;"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=_end_with_parent,"
        " start_new_session=True); print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child went on")


@pytest.mark.slow
def test_the_demo_plans_once_trains_all_stages_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PICTURES", 8)
    monkeypatch.setattr(demo, "SECONDS", {"vae": 1.0, "clip": 1.0})
    monkeypatch.setattr(demo, "TOTAL", 1.0)
    small = [
        "vae.data.count=64",
        "clip.data.count=300",
        "clip.train.batch_size=16",
        "dit.data.count=64",
        "dit.train.batch_size=8",
        "vae.preview.every_steps=20",
    ]
    demo.run_demo(ROOT / "configs/demo", small)
    report = storage.read_json(tmp_path / "runs/demo/report.json")
    assert set(report["adherence"]) >= {
        "background",
        "count",
        "colour",
        "relation",
        "size",
        "shape",
        "all",
    }
    assert set(report["adherence"]["all"]) == {"mean", "low", "high"}
    assert report["vae"]["psnr"] > 0
    assert report["seconds"] > 0
    assert 0 < report["peak_memory_gb"] < 6
    for name in ("grid.png", "curves.png"):
        assert (tmp_path / "runs/demo" / name).stat().st_size > 1000
    plan = (tmp_path / "runs/demo" / demo.PLAN).read_text()
    demo.run_demo(ROOT / "configs/demo", small)
    assert (tmp_path / "runs/demo" / demo.PLAN).read_text() == plan
