"""A torchvision that does not fit torch does not take the text encoders and diffusers with it."""

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_open_clip_and_diffusers_import_beside_any_torchvision():
    done = run("import ldm, open_clip; from diffusers import UNet2DConditionModel; print('in')")
    assert done.stdout.strip() == "in", done.stderr


def test_the_guard_is_needed_or_changes_nothing():
    """Without it the import either fails as the guard says, or torchvision fits this torch."""
    alone = run("import torchvision; print(torchvision.ops.nms)")
    guarded = run("import ldm, torchvision; print(torchvision.ops.nms)")
    assert guarded.returncode == 0, guarded.stderr
    if alone.returncode:
        assert "torchvision::nms" in alone.stderr


def test_an_operator_that_cannot_load_still_says_so():
    code = (
        "import ldm, torch, torchvision\n"
        "boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist())"
    )
    done = run(code)
    assert done.stdout.strip() == "[0]" or "Couldn't load custom C++ ops" in done.stderr


def test_operators_that_nobody_knows_are_refused_by_name(tmp_path):
    from ldm.torchvision_guard import prepare_torchvision

    registrations = '@torch.library.register_fake("torchvision::brand_new")'
    (tmp_path / "_meta_registrations.py").write_text(registrations)
    with pytest.raises(ImportError, match="brand_new"):
        prepare_torchvision(tmp_path)
