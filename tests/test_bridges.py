"""Bridges: pairs of pictures, training on them, and pictures made from pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import TINY, tiny
from torch import Tensor
from torch.testing import assert_close

from ldm import Pipeline
from ldm.build import load_vae
from ldm.cli import main
from ldm.data.pairs import open_picture_pairs, shrunk
from ldm.errors import LdmError
from ldm.inference.images import read_request
from ldm.training.bridges import picture_pairs
from ldm.training.diffusion import train_diffusion
from ldm.training.pairs import load_pairs
from ldm.training.reflow import reflow

EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets are sources with red and green exchanged; one picture belongs to no pair."""
    root = tmp_path_factory.mktemp("pictures")
    draws, rows = np.random.default_rng(0), []
    for k in range(8):
        pixels = draws.integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{k}-from.png")
        Image.fromarray(pixels[..., [1, 0, 2]]).save(root / f"{k}.png")
        row = {"file_name": f"{k}.png", "source_file_name": f"./{k}-from.png", "text": f"no {k}"}
        rows.append(row)
    Image.new("RGB", (32, 32)).save(root / "alone.png")
    rows.append({"file_name": "alone.png", "text": "alone"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_pairs_are_read_from_a_column_of_the_metadata(folder: Path, tmp_path: Path) -> None:
    pairs = open_picture_pairs(folder)
    assert pairs.ids == [f"{k}.png" for k in range(8)]
    assert pairs.captions == [f"no {k}" for k in range(8)]
    target, source = pairs[3]
    assert (target.pixels == source[..., [1, 0, 2]]).all()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    lines = (folder / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(lines.replace("./4-from.png", "../secret.png"))
    with pytest.raises(LdmError, match=r"'../secret.png' is not a picture of the folder"):
        open_picture_pairs(copy)
    (copy / "metadata.jsonl").write_text(lines.replace("source_file_name", "sauce_file_name"))
    with pytest.raises(LdmError, match="no column 'source_file_name'"):
        open_picture_pairs(copy)


def test_a_picture_made_smaller_is_a_source_too() -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    small = shrunk(pixels, 8)
    assert small.shape == (4, 8, 3)
    assert small[0, 0, 0] < 30
    assert small[0, 7, 0] > 225
    assert shrunk(pixels, 100).shape == (1, 1, 3)


def bridge_config(folder: Path, run: Path, *more: str) -> Any:
    return tiny(
        "dit",
        run,
        "data.source=imagefolder",
        f"data.path={folder}",
        "cache.shard_size=3",
        *more,
    )


@pytest.fixture(scope="module")
def bridges(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs of pictures, and a run with latent noise on them."""
    work = tmp_path_factory.mktemp("bridges")
    pairs = picture_pairs(bridge_config(folder, work / "run"), work / "pairs")
    more = (f"data.pairs={pairs}", "diffusion.source=pictures", "diffusion.latent_noise=0.5")
    more = (*more, "sample.sampler=bridge", "optim.learning_rate=0.01")
    config = bridge_config(folder, work / "run", *more, "preview.every_steps=6", "preview.count=2")
    train_diffusion(config)
    return pairs, work / "run"


def test_both_ends_are_means_of_the_posterior(folder: Path, bridges: tuple[Path, Path]) -> None:
    pairs, config = load_pairs(bridges[0]), bridge_config(folder, bridges[1])
    assert pairs.facts.source == "pictures"
    assert (len(pairs), pairs.captions[2]) == (8, "no 2")
    vae = load_vae(config.vae, config.train.seed)
    source, target = (
        torch.from_numpy(np.asarray(Image.open(folder / name), np.float32)[4:36] / 127.5 - 1)
        for name in ("2-from.png", "2.png")
    )
    for found, pixels in ((pairs.x1[2], source), (pairs.x0[2], target)):
        mean = vae.moments(pixels.permute(2, 0, 1)[None]).chunk(2, dim=1)[0]
        assert_close(found, vae.normalise(mean)[0], rtol=1e-4, atol=1e-4)


def test_a_bridge_starts_from_its_own_picture(bridges: tuple[Path, Path], folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(bridges[1])
    assert (bridges[1] / "samples/step-00000006.png").is_file()
    pictures = [Image.open(folder / f"{k}-from.png") for k in range(3)]
    settings = {"cfg_scale": 1.0, "seed": 3}
    batch = pipeline.translate(pictures, ["no 0", "no 1", "no 2"], batch_size=2, **settings)
    alone = pipeline.translate(pictures[2], "no 2", cfg_scale=1.0, seed=5)
    pixels = [np.asarray(image, int) for image in (*batch, *alone)]
    assert np.abs(pixels[2] - pixels[3]).max() <= 1
    assert np.abs(pixels[0] - pixels[1]).max() > 1
    other = pipeline.translate(pictures[2:], "no 2", cfg_scale=1.0, seed=6)
    assert np.abs(np.asarray(other[0], int) - pixels[2]).max() > 1, "latent noise of the seed"
    still = [
        pipeline.translate(pictures[2:], "no 2", cfg_scale=1.0, seed=k, eta=0.0) for k in (0, 1)
    ]
    assert (np.asarray(still[0][0]) == np.asarray(still[1][0])).all()


def test_without_a_step_a_bridge_is_at_its_source(bridges: tuple[Path, Path]) -> None:
    """x at t = 1 is the source itself: nothing is scaled and no noise is added."""
    pairs, pipeline = load_pairs(bridges[0]), Pipeline.from_pretrained(bridges[1])
    seen: list[Tensor] = []
    pipeline.net.register_forward_pre_hook(lambda net, given: seen.append(given[0]))
    request = replace(pipeline.requests("no 2", cfg_scale=1.0, steps=2)[0], source="2")
    pipeline.latents([request], pairs.x1[2:3])
    assert_close(seen[0], pairs.x1[2:3], **EXACT)
    with pytest.raises(LdmError, match="begins at t=0"):
        pipeline.latents([replace(request, spacing="leading")], pairs.x1[2:3])


def test_a_model_of_pictures_refuses_a_prompt_alone(
    bridges: tuple[Path, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.from_pretrained(bridges[1])
    with pytest.raises(LdmError, match="starts from a picture, not from noise"):
        pipeline("no 2")
    source = Image.open(folder / "2-from.png")
    with pytest.raises(LdmError, match="use bridge"):
        pipeline.translate([source], "no 2", sampler="euler")
    with pytest.raises(LdmError, match="2 prompts for 1 source"):
        pipeline.translate([source], ["one", "two"])
    with pytest.raises(LdmError, match="size is settled"):
        pipeline.translate([source], "no 2", size=64)
    with pytest.raises(LdmError, match="starts from a picture"):
        reflow(bridges[1], tmp_path / "out", 2)
    arguments = ["translate", str(folder / "2-from.png"), "--model", str(bridges[1])]
    assert main([*arguments, "--prompt", "no 2", "--out", str(tmp_path / "out")]) == 0
    saved = Path(capsys.readouterr().out.strip())
    request, _, _ = read_request(saved)
    assert request.source is not None
    assert len(request.source) == 64
    assert main(["replay", str(saved), "--out", str(tmp_path / "out")]) == 2
    assert "its source picture is not stored" in capsys.readouterr().err


def test_any_data_set_gives_pairs_by_shrinking(tmp_path: Path) -> None:
    config = tiny("dit", tmp_path / "run", "data.count=6", "cache.shard_size=4")
    pairs = load_pairs(picture_pairs(config, tmp_path / "pairs", shrink=4, count=5))
    assert len(pairs) == 5
    assert (pairs.x0 - pairs.x1).abs().amax((1, 2, 3)).min() > 0.01
    with pytest.raises(LdmError, match="names no source pictures"):
        picture_pairs(config, tmp_path / "other")
    with pytest.raises(LdmError, match="reduces nothing"):
        picture_pairs(config, tmp_path / "other", shrink=1)


def test_configurations_and_changes_may_stand_behind_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs"
    before = ["pairs", "images", str(TINY["dit"]), "--out", str(out), "run.dir=x", "-n", "2"]
    assert main([*before, "data.source=imagefolder", f"data.path={folder}"]) == 0
    assert len(load_pairs(out)) == 2
    capsys.readouterr()
    assert main(["config", "show", "--debug", "train.seed=1", str(TINY["dit"]), "run.dir=y"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 1" in shown
    assert "dir: y" in shown
    for wrong in ([*before, "--colour", "red"], ["infer", "--model", "m", "stray"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_pair_with_an_unreadable_end_is_set_aside(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "5-from.png").write_bytes(b"no picture")
    pairs = load_pairs(picture_pairs(bridge_config(copy, tmp_path / "run"), tmp_path / "pairs"))
    assert list(pairs.bad) == ["5.png"]
    assert pairs.x0[5].abs().max() == pairs.x1[5].abs().max() == 0
    assert pairs.x1[4].abs().max() > 0
    with pytest.raises(LdmError, match="1 of 8 pictures cannot be used"):
        load_pairs(tmp_path / "pairs", max_bad_fraction=0.1)


def test_pairs_of_a_metadata_file_cannot_keep_some_out(folder: Path, tmp_path: Path) -> None:
    config = bridge_config(folder, tmp_path / "run", "data.holdout=4")
    with pytest.raises(LdmError, match="data.holdout=4 keeps nothing out"):
        picture_pairs(config, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


def test_a_source_has_the_colours_of_its_file_however_it_is_given(
    bridges: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "clear.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file)
    model, out = str(bridges[1]), str(tmp_path / "out")
    assert main(["translate", str(file), "--model", model, "--out", out, "--steps", "2"]) == 0
    with Image.open(capsys.readouterr().out.strip()) as saved, Image.open(file) as opened:
        drawn = Pipeline.from_pretrained(model).translate([opened], "", steps=2)
        assert np.array_equal(np.asarray(drawn[0]), np.asarray(saved))
