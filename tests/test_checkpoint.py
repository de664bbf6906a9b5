"""Tensors, resume state, contract and whole checkpoints come back exactly, or say why not."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ldm import checkpoint, storage
from ldm.checkpoint import Contract
from ldm.errors import ExitCode, LdmError
from ldm.types import TextEmbedding

EXACT = {"rtol": 0, "atol": 0}  # nothing is computed here: bits in, bits out


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, **EXACT, equal_nan=True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


# Tensors


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """All kinds: types, no dimension, empty, a view, a tied pair."""
    wide = torch.randn(4, 6)
    return {
        "bf16": torch.randn(3, dtype=torch.bfloat16),
        "f16": torch.randn(2, 2).half(),
        "f64": torch.randn(2, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "int": torch.tensor(-5),
        "byte": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "view": wide[:, 1:3],
        "transposed": wide.T,
        "tied": wide,
    }


def test_tensors_come_back_bit_for_bit(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "a.safetensors", tensors)
    assert_same(checkpoint.load_tensors(tmp_path / "a.safetensors"), tensors)


def test_the_file_is_what_the_safetensors_library_would_write(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint.save_tensors(tmp_path / "ours", tensors)
    plain = {name: value.contiguous().clone() for name, value in tensors.items()}
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), plain)
    plain = {"b": torch.randn(3), "a": torch.randn(2, 2), "c": torch.randn(1).half()}
    checkpoint.save_tensors(tmp_path / "ours", plain)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(plain, {"format": "pt"})


def test_others_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        checkpoint.save_tensors(tmp_path / "a", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "a", {"x": torch.ones(100_000)})
    loaded = checkpoint.load_tensors(tmp_path / "a")
    os.truncate(tmp_path / "a", 0)
    assert float(loaded["x"].sum()) == 100_000


def test_every_truncation_names_file_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save_tensors(path, {"x": torch.ones(8)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(LdmError, match=f"has {length} bytes, expected") as caught:
            checkpoint.load_tensors(path)
        assert caught.value.where == str(path)
    path.write_bytes(data + b"more")
    with pytest.raises(LdmError, match=f"has {len(data) + 4} bytes, expected {len(data)}"):
        checkpoint.load_tensors(path)


def entry(dtype: str, shape: list[int], start: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        b"<html><body>not found</body></html>",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        *[
            struct.pack("<Q", len(text)) + text + bytes(8)
            for text in [
                b"[]",
                b"null",
                b"{bad",
                b'{"x": 1}',
                b'{"x": {"data_offsets": "no"}}',
                json.dumps({"x": entry("F32", [2], 0, "8")}).encode(),
                json.dumps({"x": entry("F32", [2], 4, 12)}).encode(),
                json.dumps({"x": entry("F32", [2**62, 4], 0, 8)}).encode(),
                json.dumps({"x": entry("F32", [-1], 0, 8)}).encode(),
                json.dumps({"x": entry("F99", [2], 0, 8)}).encode(),
                json.dumps({"x": entry("F32", [2], 8, 0)}).encode(),
                json.dumps({"x": entry("F32", [2], 0, 8), "y": entry("F32", [1], 4, 8)}).encode(),
            ]
        ],
    ],
)
def test_a_hostile_file_is_one_clear_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(LdmError) as caught:
        checkpoint.load_tensors(path)
    assert caught.value.code == ExitCode.IO
    assert caught.value.where == str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    bad = {"good": torch.ones(2), "bad": torch.tensor([1.0, value], dtype=torch.bfloat16)}
    checkpoint.save_tensors(tmp_path / "a", bad)
    with pytest.raises(LdmError, match="NaN or infinity in 'bad'"):
        checkpoint.load_tensors(tmp_path / "a")
    assert_same(checkpoint.load_tensors(tmp_path / "a", finite=False), bad)


def test_a_file_size_limit_is_explained_and_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint.save_tensors(tmp_path / "a", {"x": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(LdmError, match="File too large.*bytes needed") as caught:
            checkpoint.save_tensors(tmp_path / "a", {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == ExitCode.IO
    assert_same(checkpoint.load_tensors(tmp_path / "a"), {"x": torch.ones(3)})


# Modules


def test_a_module_comes_back_whatever_it_was_wrapped_in(tmp_path: Path) -> None:
    source, target = model(), model()
    nn.init.zeros_(target[0].weight)
    wrapped = {f"module._orig_mod.{name}": v for name, v in source.state_dict().items()}
    checkpoint.save_module(tmp_path / "unet", wrapped, {"_class_name": "UNet2DConditionModel"})
    tensors, config = checkpoint.load_module(tmp_path / "unet")
    assert config == {"_class_name": "UNet2DConditionModel"}
    checkpoint.load_strict(nn.Sequential(target), {f"0.{n}": v for n, v in tensors.items()}, "")
    assert_same(target.state_dict(), source.state_dict())
    nn.init.zeros_(target[0].weight)
    compiled = nn.Module()  # what torch.compile returns has its model under this name
    compiled._orig_mod = target
    checkpoint.load_strict(compiled, wrapped, "here")
    assert_same(target.state_dict(), source.state_dict())


def test_weights_that_do_not_fit_change_nothing_and_name_at_most_five() -> None:
    target = model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    given = {f"other.{n}": torch.zeros(1) for n in range(7)}
    given["0.weight"] = torch.zeros(3, 5)
    given["1.weight"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(LdmError) as caught:
        checkpoint.load_strict(target, given, "some/file")
    text = str(caught.value)
    assert "2 missing (0.bias, 1.bias)" in text
    assert "7 unexpected (other.0, other.1, other.2, other.3, other.4, ...)" in text
    assert "0.weight (3, 5), the model has (3, 4)" in text
    assert "1.weight torch.float64, the model has torch.float32" in text
    assert text.startswith("some/file: ")
    assert_same(target.state_dict(), before)


def test_a_narrower_type_is_widened_and_a_wider_one_is_not_rounded() -> None:
    half = {name: value.half() for name, value in model().state_dict().items()}
    target = model()
    checkpoint.load_strict(target, half, "")
    assert_same(target.state_dict(), {name: value.float() for name, value in half.items()})
    with pytest.raises(LdmError, match="of another type"):
        checkpoint.load_strict(model().bfloat16(), half, "")


# Resume state


def stepped(
    net: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0
) -> dict[str, Tensor]:
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(step)
        net(
            torch.randn(5, 4, generator=generator, dtype=net[0].weight.dtype)
        ).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in net.state_dict().items()}


def adamw(net: nn.Module, fused: bool, learning_rate: float = 0.01) -> torch.optim.AdamW:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.8, 0.95), fused=fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_goes_on_bit_for_bit(fused: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    net = model().to(dtype)
    optimizer = adamw(net, fused)
    stepped(net, optimizer, 3)
    moments, facts = checkpoint.optimizer_state(optimizer, net.named_parameters())
    saved = checkpoint.pack("model", net.state_dict()) | checkpoint.pack("optimizer", moments)
    checkpoint.save_state(tmp_path / "state", saved, {"optimizer": facts, "cursor": 17})
    before = {name: value.clone() for name, value in moments.items()}  # they are the live ones
    expected = stepped(net, optimizer, 3, start=3)

    tensors, items = checkpoint.load_state(tmp_path / "state", ["model", "optimizer", "cursor"])
    resumed = model().to(dtype)
    other = adamw(resumed, fused, learning_rate=0.5)  # the saved rate wins
    checkpoint.load_strict(resumed, checkpoint.unpack("model", tensors), "")
    restored = checkpoint.unpack("optimizer", tensors)
    assert_same(restored, before)
    checkpoint.load_optimizer_state(other, resumed.named_parameters(), restored, items["optimizer"])
    assert items["cursor"] == 17
    assert other.param_groups[0]["betas"] == (0.8, 0.95)
    assert other.param_groups[0]["fused"] is fused
    assert_same(stepped(resumed, other, 3, start=3), expected)


def test_moments_keep_a_type_wider_than_their_parameter() -> None:
    net = model().bfloat16()
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        moments = torch.randn(parameter.shape), torch.rand(parameter.shape)
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": moments[0],
            "exp_avg_sq": moments[1],
        }
    tensors, facts = checkpoint.optimizer_state(optimizer, net.named_parameters())
    facts = json.loads(json.dumps(facts))
    other = torch.optim.AdamW(net.parameters())
    checkpoint.load_optimizer_state(other, net.named_parameters(), tensors, facts)
    assert_same(checkpoint.optimizer_state(other, net.named_parameters())[0], tensors)
    assert other.state[net[0].weight]["exp_avg"].dtype == torch.float32


def test_an_optimizer_that_has_not_stepped_or_keeps_no_tensors_comes_back() -> None:
    net = model()
    fresh = torch.optim.SGD(net.parameters(), lr=0.1)
    tensors, facts = checkpoint.optimizer_state(fresh, net.named_parameters())
    assert tensors == {}
    checkpoint.load_optimizer_state(fresh, net.named_parameters(), {}, facts)


def test_another_optimizer_is_refused() -> None:
    net = model()
    optimizer = adamw(net, fused=False)
    stepped(net, optimizer, 1)
    tensors, facts = checkpoint.optimizer_state(optimizer, net.named_parameters())
    flat = torch.optim.AdamW(net.parameters())
    with pytest.raises(LdmError, match="other groups"):
        checkpoint.load_optimizer_state(flat, net.named_parameters(), tensors, facts)
    del tensors["exp_avg/0.weight"]
    with pytest.raises(LdmError, match=r"missing or unknown state: exp_avg/0\.weight"):
        checkpoint.load_optimizer_state(optimizer, net.named_parameters(), tensors, facts)


def test_the_resume_state_is_closed(tmp_path: Path) -> None:
    tensors = {"model/x": torch.ones(1), "ema/x": torch.ones(1)}
    checkpoint.save_state(tmp_path, tensors, {"cursor": 3})
    checkpoint.load_state(tmp_path, {"model", "ema", "cursor"})
    with pytest.raises(LdmError, match=r"missing \['scaler'\], unknown nothing"):
        checkpoint.load_state(tmp_path, {"model", "ema", "cursor", "scaler"})
    with pytest.raises(LdmError, match=r"missing nothing, unknown \['ema'\]"):
        checkpoint.load_state(tmp_path, {"model", "cursor"})
    checkpoint.save_tensors(tmp_path / "tensors.safetensors", {"model/x": torch.ones(1)})
    with pytest.raises(LdmError, match="not of the same save"):
        checkpoint.load_state(tmp_path, {"model", "ema", "cursor"})


# Contract


CONTRACT = Contract(
    process="rectified_flow",
    prediction="flow",
    data_std=None,
    clock="unit",
    latent_channels=2,
    latent_mean=(0.1 + 0.2, -1.0),
    latent_std=(1.5, 0.7),
    downsample_factor=8,
    null_embedding="null_embedding.safetensors",
    null_embedding_sha256="0" * 64,
    caption_dropout=0.1,
    text_encoder="openai/clip-vit-large-patch14",
    text_encoder_sha256="1" * 64,
    tokenizer_sha256="2" * 64,
    max_tokens=77,
    mask_rule="masked",
    image_sizes=((64, 64), (64, 96)),
    sampling={"sampler": "heun", "steps": 30, "cfg_scale": 4.5},
)


def test_a_contract_comes_back_equal(tmp_path: Path) -> None:
    checkpoint.save_contract(tmp_path, CONTRACT)
    assert checkpoint.load_contract(tmp_path) == CONTRACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "it has format 2, this program knows formats 1 to 1"),
        ({"format_version": "x"}, "it has format 'x'"),
        ({"process": 3}, "process has the wrong type"),
        ({"max_tokens": True}, "max_tokens has the wrong type"),
        ({"new": 3}, r"unknown fields \['new'\]"),
        ({"latent_std": [1.0]}, "latent_std must be 2 finite numbers"),
        ({"latent_std": [1.0, 0.0]}, "latent_std must be > 0"),
        ({"latent_mean": ["a", "b"]}, "could not convert"),
        ({"image_sizes": [64]}, "contract"),
        ({"caption_dropout": 1.5}, "caption_dropout must be in"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    storage.write_json(tmp_path / "contract.json", {**CONTRACT.to_json(), **change})
    with pytest.raises(LdmError, match=message) as caught:
        checkpoint.load_contract(tmp_path)
    assert caught.value.code == ExitCode.IO
    storage.write_json(tmp_path / "contract.json", [])
    with pytest.raises(LdmError, match="cannot be used"):
        checkpoint.load_contract(tmp_path)


@pytest.mark.parametrize("pooled", [None, torch.randn(1, 6)])
def test_the_null_embedding_comes_back(pooled: Tensor | None, tmp_path: Path) -> None:
    null = TextEmbedding(
        torch.randn(1, 5, 4), torch.tensor([[True, True, False, False, False]]), pooled
    )
    digest = checkpoint.save_null(tmp_path, null)
    loaded = checkpoint.load_null(tmp_path)
    torch.testing.assert_close(loaded.tokens, null.tokens, **EXACT)
    assert torch.equal(loaded.mask, null.mask)
    assert (loaded.pooled is None) == (pooled is None)
    assert checkpoint.save_null(tmp_path, null) == digest, "the same embedding, the same hash"


def test_diffusers_finds_the_parts_by_the_model_index(tmp_path: Path) -> None:
    checkpoint.save_model_index(tmp_path, {"vae": ("diffusers", "AutoencoderKL")})
    index = storage.read_json(tmp_path / "model_index.json")
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["_class_name"] == "StableDiffusionPipeline"
