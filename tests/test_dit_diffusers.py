"""A DiT and the diffusers class of its configuration compute the same, weights go both ways."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from ldm.errors import LdmError
from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_config import DIT_SIZES, published_dit
from ldm.models.dit_diffusers import (
    dit_weights_from_diffusers,
    dit_weights_from_original,
    dit_weights_to_diffusers,
)
from ldm.models.positions import sincos_positions
from ldm.types import TextEmbedding

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "patch_size": 2,
}
PIXART = SMALL | {"cross_attention_dim": 48, "caption_channels": 20, "sample_size": 16}


def filled(model, size=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return model.eval()


def ours_of(theirs):
    config = DiTConfig.from_diffusers(dict(theirs.config) | {"_class_name": type(theirs).__name__})
    net = DiT(config).eval()
    net.load_state_dict(dit_weights_from_diffusers(theirs.state_dict(), config))
    return net


def inputs(side=16, batch=3, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side, generator=generator)
    return x, torch.tensor([3.0, 517.0, 999.0])[:batch], torch.randn(x.shape, generator=generator)


def words(width, length=7, batch=3):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(length) < torch.tensor([length, 2, 5])[:batch, None]
    tokens = torch.randn(batch, length, width, generator=generator)
    sizes = torch.tensor([[0, 0, 0, 0, 512.0, 768.0]]).expand(batch, -1)
    return TextEmbedding(tokens, mask, sizes=sizes)


def pixart_call(net, x, t, text, sized=False):
    added = None
    if sized:
        added = {
            "resolution": text.sizes[:, 4:],
            "aspect_ratio": text.sizes[:, 4:5] / text.sizes[:, 5:],
        }
    return net(
        x,
        encoder_hidden_states=text.tokens,
        timestep=t,
        encoder_attention_mask=text.mask.to(x.dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def same(got, wanted, tolerance):
    """Relative to the largest value: rounding is of the size of what is summed."""
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation_scale": 2},
        {"activation_fn": "gelu"},
        {"caption_channels": None},
        {"use_additional_conditions": True},
    ],
    ids=["plain", "interpolated", "erf", "no caption projection", "told the size"],
)
@pytest.mark.parametrize("side", [16, 24])
def test_pixart_has_equal_outputs_and_gradients(changes, side):
    values = PIXART | changes
    theirs = filled(PixArtTransformer2DModel(**values))
    ours = ours_of(theirs)
    x, t, target = inputs(side)
    text = words(values["caption_channels"] or 48)
    wanted = pixart_call(theirs, x, t, text, "use_additional_conditions" in changes)
    got = ours(x, t, text)
    same(got, wanted, 1e-5)
    ((got[:, :4] - target).square().mean() + got[:, 4:].mean()).backward()
    ((wanted[:, :4] - target).square().mean() + wanted[:, 4:].mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    expected = dit_weights_from_diffusers(gradients, ours.config)
    for name, parameter in ours.named_parameters():
        same(parameter.grad, expected[name], 1e-4)


@pytest.mark.parametrize("patch", [1, 2])
def test_dit_has_equal_outputs_and_gradients(patch):
    values = SMALL | {"sample_size": 8, "num_embeds_ada_norm": 10, "patch_size": patch}
    theirs = filled(DiTTransformer2DModel(**values))
    share_embeddings(theirs)
    ours = ours_of(theirs)
    x, t, target = inputs(8)
    labels = torch.tensor([4, 10, 0])  # 10 is no label
    wanted = theirs(x, timestep=t, class_labels=labels, return_dict=False)[0]
    got = ours(x, t, label(labels, 10))
    same(got, wanted, 1e-5)
    (got[:, :4] - target).square().mean().backward()
    (wanted[:, :4] - target).square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for end in ("timestep_embedder.linear_1.weight", "class_embedder.embedding_table.weight"):
        copies = [name for name in gradients if name.endswith(end)]
        total = sum(gradients[name] for name in copies)  # of one weight that all blocks share
        gradients.update(dict.fromkeys(copies, total))
    for end in ("linear_1.bias", "linear_2.weight", "linear_2.bias"):
        copies = [name for name in gradients if name.endswith(f"timestep_embedder.{end}")]
        gradients.update(dict.fromkeys(copies, sum(gradients[name] for name in copies)))
    expected = dit_weights_from_diffusers(gradients, ours.config)
    for name, parameter in ours.named_parameters():
        same(parameter.grad, expected[name], 1e-4)


def label(indices, classes):
    rows = torch.nn.functional.one_hot(indices, classes + 1).float()
    return TextEmbedding(rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool), rows)


def share_embeddings(theirs):
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first)


def test_weights_and_configurations_go_there_and_back():
    for theirs in (
        filled(PixArtTransformer2DModel(**PIXART, use_additional_conditions=True)),
        filled(DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=10)),
    ):
        if isinstance(theirs, DiTTransformer2DModel):
            share_embeddings(theirs)
        ours = ours_of(theirs)
        back = dit_weights_to_diffusers(ours.state_dict(), ours.config)
        assert back.keys() == theirs.state_dict().keys()
        assert all(value.equal(theirs.state_dict()[name]) for name, value in back.items())
        values = ours.config.to_diffusers()
        assert DiTConfig.from_diffusers(values) == ours.config
        again = type(theirs).from_config(values)
        again.load_state_dict(back)


def test_blocks_that_embed_labels_each_in_their_own_way_are_refused():
    theirs = filled(DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=10))
    with pytest.raises(LdmError, match="do not share one"):
        ours_of(theirs)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_type": "ada_norm"}, "norm_type"),
        ({"attention_bias": False}, "attention_bias"),
        ({"activation_fn": "swish"}, "swish"),
        ({"cross_attention_dim": 96}, "cross_attention_dim is 96"),
        ({"_class_name": "SanaTransformer2DModel"}, "SanaTransformer2DModel"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(LdmError, match=named):
        DiTConfig.from_diffusers({"_class_name": "PixArtTransformer2DModel"} | PIXART | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"positions": "rope"}, "positions"),
        ({"local_conv": True}, "local_conv"),
        ({"conditioning": "adaln_zero"}, "conditioning"),
        ({"base_size": None}, "sample_size"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(changes, named):
    legal = DiTConfig.from_diffusers({"_class_name": "PixArtTransformer2DModel"} | PIXART)
    config = replace(legal, **changes)
    with pytest.raises(LdmError, match=named):
        config.to_diffusers()


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [("S", 2, 33), ("B", 2, 130), ("L", 2, 458), ("XL", 2, 675), ("S", 8, 33), ("XL", 4, 675)],
)
def test_published_models_have_the_published_number_of_parameters(size, patch, millions):
    with torch.device("meta"):
        net = DiT(published_dit(size, patch))
    count = net.published_parameters()
    assert abs(count / 1e6 - millions) < 0.6
    if (size, patch) == ("XL", 2):
        assert count == 675_129_632


def test_diffusers_and_our_published_model_hold_the_same_layers():
    ours = published_dit("XL", 2)
    values = dict(SMALL, num_attention_heads=16, attention_head_dim=72, num_layers=28)
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(**values)
        net = DiT(ours)
    state = net.state_dict()
    back = dit_weights_to_diffusers(
        {name: torch.empty_like(value) for name, value in state.items()}, ours
    )
    assert {n: v.shape for n, v in back.items()} == {
        n: v.shape for n, v in theirs.state_dict().items()
    }


def test_a_checkpoint_of_the_authors_of_dit_is_read():
    config = PUBLISHED_SMALL
    net = filled(DiT(config))
    original = original_state(net)
    assert "blocks.1.attn.qkv.weight" in original
    assert "final_layer.adaLN_modulation.1.bias" in original
    back = dit_weights_from_original(original, config)
    assert back.keys() == net.state_dict().keys()
    assert all(value.equal(net.state_dict()[name]) for name, value in back.items())
    original["pos_embed"] = original["pos_embed"].flip(1)
    with pytest.raises(LdmError, match="pos_embed"):
        dit_weights_from_original(original, config)


PUBLISHED_SMALL = replace(
    published_dit("S", 2), hidden_size=64, num_layers=2, head_dim=16, num_classes=10, base_size=4
)


def original_state(net):
    """The released names, written out: no code of ours."""
    ours = net.state_dict()
    names = {
        "x_embedder.proj": "proj_in",
        "t_embedder.mlp.0": "time.0",
        "t_embedder.mlp.2": "time.2",
        "final_layer.adaLN_modulation.1": "modulation_out",
    }
    for i in range(2):
        for theirs, mine in (
            ("attn.qkv", "attn1.to_qkv"),
            ("attn.proj", "attn1.to_out"),
            ("mlp.fc1", "ff.0"),
            ("mlp.fc2", "ff.2"),
            ("adaLN_modulation.1", "modulation"),
        ):
            names[f"blocks.{i}.{theirs}"] = f"transformer_blocks.{i}.{mine}"
    state = {f"{a}.{k}": ours[f"{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    state["y_embedder.embedding_table.weight"] = ours["labels.weight"]
    for kind in ("weight", "bias"):  # rows of (row, column, channel)
        rows = ours[f"proj_out.{kind}"].unflatten(0, (8, 2, 2)).movedim(0, 2)
        state[f"final_layer.linear.{kind}"] = rows.flatten(0, 2)
    table = sincos_positions(4, 4, 64, column_first=True)
    return state | {"pos_embed": table[None]}


def test_the_table_of_sizes_is_that_of_the_paper():
    assert {name: tuple(size) for name, size in DIT_SIZES.items()} == {
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
    }
