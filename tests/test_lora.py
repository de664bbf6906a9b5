"""Adapters: no change at first, merged equals adapted, and diffusers reads what is written."""

import json

import pytest
import torch
from torch.testing import assert_close

import ldm  # noqa: F401
from ldm.errors import LdmError
from ldm.models import lora
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.types import TextEmbedding

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=24,
    norm_num_groups=8,
)


def unet():
    torch.manual_seed(0)
    net = UNet(CONFIG)
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


def inputs():
    draw = torch.Generator().manual_seed(1)
    text = TextEmbedding(torch.randn(2, 5, 24, generator=draw), torch.ones(2, 5, dtype=torch.bool))
    return torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3.0, 700.0]), text


def adapted(targets="attention", alpha=3.0):
    """A network whose adapters say something, B being 0 when fresh."""
    net = unet()
    lora.add_adapters(net, rank=2, alpha=alpha, targets=targets)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=draw)
    return net


def test_fresh_adapters_change_no_output():
    net = unet()
    before = net(*inputs())
    lora.add_adapters(net, rank=4, alpha=8.0)
    assert torch.equal(net(*inputs()), before)


def test_a_step_moves_adapters_and_nothing_else():
    net = adapted()
    base = {name: value.clone() for name, value in lora.base_state(net).items()}
    trained = [p for p in net.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    net(*inputs()).square().mean().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(not torch.equal(a, b) for a, b in zip(first, trained, strict=True))
    assert base.keys() == unet().state_dict().keys()
    for name, value in lora.base_state(net).items():
        assert torch.equal(value, base[name]), name


@pytest.mark.parametrize("targets", lora.TARGETS)
def test_merged_weights_draw_what_the_adapters_draw(targets):
    net, plain = adapted(targets), unet()
    lora.merge(plain, lora.adapters_of(net))
    wanted = net(*inputs())
    assert (wanted - unet()(*inputs())).abs().max() > 0.01  # they say something
    assert_close(plain(*inputs()), wanted, rtol=1e-5, atol=1e-5)


def test_taking_adapters_out_again_restores_the_weights():
    net, adapters = unet(), lora.adapters_of(adapted())
    lora.merge(net, adapters)
    lora.merge(net, adapters, strength=-1.0)
    for name, first in unet().state_dict().items():
        assert_close(net.state_dict()[name], first, rtol=0, atol=1e-6)


def test_diffusers_loads_the_file_and_draws_the_same(tmp_path):
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    net = adapted()
    tensors = lora.to_tensors(lora.adapters_of(net), "unet")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / lora.WEIGHTS)
    theirs = UNet2DConditionModel.from_config(CONFIG.to_diffusers())
    theirs.load_state_dict(unet().state_dict())
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name=lora.WEIGHTS)
    x, t, text = inputs()
    drawn = theirs(x, t, text.tokens).sample
    assert_close(drawn, net(x, t, text), rtol=1e-5, atol=1e-5)


def test_what_diffusers_writes_is_read_with_its_alpha(tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from safetensors import safe_open

    theirs = UNet2DConditionModel.from_config(CONFIG.to_diffusers())
    theirs.load_state_dict(unet().state_dict())
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.add_adapter(
        LoraConfig(r=4, lora_alpha=12, target_modules=names, init_lora_weights=False)
    )
    theirs.save_lora_adapter(tmp_path, weight_name=lora.WEIGHTS)
    with safe_open(tmp_path / lora.WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        alphas = lora.stated_alphas(file.metadata(), "f")
    net = unet()
    lora.merge(net, lora.from_tensors(tensors, net, "file", alphas))
    x, t, text = inputs()
    assert_close(net(x, t, text), theirs(x, t, text.tokens).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["diffusers of old", "kohya"])
def test_other_spellings_mean_the_same(style):
    net = unet()
    adapters = lora.adapters_of(adapted(alpha=6.0))
    tensors = {}
    for name, adapter in adapters.items():
        if style == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = (
                adapter.down,
                adapter.up,
            )
            tensors[f"{stem}.alpha"] = torch.tensor(6.0)
        else:
            tensors[f"unet.{name}.lora.down.weight"] = adapter.down
            tensors[f"unet.{name}.lora.up.weight"] = adapter.up * adapter.scale
    read = lora.from_tensors(tensors, net, "file")
    assert read.keys() == adapters.keys()
    for name, adapter in adapters.items():
        assert_close(read[name].delta(), adapter.delta(), rtol=1e-6, atol=1e-7)


def test_tensors_that_fit_nowhere_are_named():
    net = unet()
    tensors = lora.to_tensors(lora.adapters_of(adapted()), "unet")
    with pytest.raises(LdmError, match="text_encoder.layers.0.q"):
        lora.from_tensors(
            {**tensors, "text_encoder.layers.0.q.lora_A.weight": torch.ones(1)}, net, "f"
        )
    name = next(iter(tensors))
    with pytest.raises(LdmError, match=name.removeprefix("unet.").partition(".lora")[0]):
        lora.from_tensors({**tensors, name: torch.ones(2, 7)}, net, "f")
    half = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(LdmError, match="fit no layer"):
        lora.from_tensors(half, net, "f")
    with pytest.raises(LdmError, match="none at all"):
        lora.from_tensors({}, net, "f")


def test_metadata_gives_alphas_per_layer():
    facts = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"mid.to_q": 8}, "unet.r": 2}
    assert lora.stated_alphas({lora.METADATA: json.dumps(facts)}, "f") == {"": 4.0, "mid.to_q": 8.0}
    assert lora.stated_alphas({}, "f") == {}
