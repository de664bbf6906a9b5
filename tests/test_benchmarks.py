"""The benchmarks run, compare equal things only, and write what `make benchmark` promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import page
from benchmarks.measure import SMOKE, Budget, Row, Times, assert_equal, in_turns
from benchmarks.pairs import dit_pair, mmdit_pair, unet_pair

ROOT = Path(__file__).parent.parent


def test_sides_take_turns_and_the_ratio_is_the_median_over_turns() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    in_turns(arms, Budget(seconds=0, least=2, warm=1))
    assert order == ["a", "b", "a", "b", "b", "a"], "a warm turn, then A B B A"
    times = Times({"ours": [1.0, 20.0, 3.0], "peer": [4.0, 40.0, 3.0]})
    row = times.row("x", "ours", "peer", 1.5)
    assert (row.ratio, row.ours_ms, row.peer_ms) == (2.0, 3.0, 4.0)
    assert row.iqr == (1.5, 3.0)


def test_different_results_are_not_timed() -> None:
    one = torch.tensor([100.0, 1.0])
    assert_equal(one, one + 0.001, 1e-4, "close")
    for other in (one + 0.1, one * float("nan")):
        with pytest.raises(AssertionError, match="nothing to compare"):
            assert_equal(one, other, 1e-4, "far")


@pytest.mark.parametrize(
    "build",
    [
        lambda: unet_pair((16, 32, 32, 32), 32),
        lambda: dit_pair(2, 1, 32),
        lambda: mmdit_pair(2, 1, 32),
    ],
    ids=["unet", "dit", "mmdit"],
)
def test_pairs_are_equal_before_any_time_is_taken(build) -> None:
    pair = build()
    x, t, text = pair.inputs(2, 8)
    with torch.no_grad():
        wanted = pair.call_peer(pair.peer, x, t, text)
        for net in (pair.ours, pair.tuned()):
            assert_equal(net(x, t, text), wanted, 2e-5, pair.name)
        with pytest.raises(AssertionError):
            assert_equal(pair.ours(x, t + 50, text), wanted, 2e-5, pair.name)


QUICK = ("samplers", "optimizer", "jpeg", "dispatch")


def test_a_run_writes_the_promised_file_and_keeps_rows_of_other_groups(tmp_path: Path) -> None:
    out = tmp_path / "results" / "latest.json"
    command.run(["samplers", "optimizer"], SMOKE, out)
    command.run(["jpeg", "dispatch", "optimizer"], SMOKE, out)
    document = json.loads(out.read_text())
    assert document.keys() >= {"rows", "hardware", "commit", "versions"}
    assert document["versions"]["torch"] == torch.__version__
    groups = [row["group"] for row in document["rows"]]
    assert list(dict.fromkeys(groups)) == list(QUICK), "in the order of the table"
    for row in document["rows"]:
        assert row.keys() == {"group", *Row.__dataclass_fields__}
        assert row["ratio"] > 0
        assert row["goal"] is None or row["goal"] > 0
    names = [row["name"] for row in document["rows"]]
    assert len(set(names)) == len(names), "a name says which row it is"
    assert {"AdamW step", "EMA update", "dispatch-bound forward"} <= set(names)


def test_the_page_keeps_its_words_and_shows_every_row(tmp_path: Path) -> None:
    rows = [
        {"group": "g", **vars(Row("fast", "peer", 2.0, 1.5, 1.0, 2.0, (1.9, 2.1)))},
        {"group": "g", **vars(Row("limit", "limit 3 s", 0.5, 1.0))},
    ]
    document = {
        "rows": rows,
        "hardware": "a core",
        "commit": "abc",
        "versions": {"torch": "2"},
        "date": "today",
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "benchmarks.md").write_text(f"# Words\n{page.BEGIN}\nold\n{page.END}\nmore\n")
    page.write(document, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.startswith("# Words\n")
    assert text.endswith("\nmore\n")
    assert "old" not in text
    assert "| fast |  | peer | 1 | 2 | **2.00** | 1.90-2.10 | 1.5 |  |" in text
    assert (tmp_path / "images" / "benchmarks.png").stat().st_size > 1000


def test_importing_the_command_leaves_the_process_as_it_was() -> None:
    code = (
        "import os, torch; before = dict(os.environ), torch.get_num_threads();"
        "import benchmarks.__main__;"
        "assert (dict(os.environ), torch.get_num_threads()) == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_gpu_script_runs_everywhere_and_says_what_it_skips() -> None:
    groups = ["calibrate", "train_unet", "latency", "vae", "optimizer", "feed", "transformers"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--only", *groups],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["group"] for line in lines if line["name"] == "done"] == groups
    assert not [line for line in lines if "failed" in line]
    if not torch.cuda.is_available():
        skipped = {line["name"] for line in lines if "skipped" in line}
        assert "whole-loop graph" in skipped
        assert any(name.startswith("attention xformers") for name in skipped)
    times = [line for line in lines if "per_evaluation_ms" in line]
    assert {line["name"] for line in times} == {"peer eager B1", "ours eager B1"} or not times
