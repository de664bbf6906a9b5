"""What users get wrong with published models ends in one sentence, never in a traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.checkpoint.pickles import convert_pickle
from ldm.errors import LdmError
from ldm.exchange.exporting import Model, write_single_file
from ldm.exchange.opening import Options, open_codec, open_published
from ldm.inference.adapters import located
from ldm.inference.pipeline import Pipeline
from ldm.models import lora
from tests.published import PROMPT, SIDE, sd1, sdxl

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An SD 1 and an SDXL as directories, and the SD 1 as one file."""
    root = tmp_path_factory.mktemp("models")
    for name, make in (("sd1", sd1), ("sdxl", sdxl)):
        make().save_pretrained(root / name, safe_serialization=True)
    found = open_published(root / "sd1")
    model = Model(found.vae, found.encoder, found.net, found.contract)
    write_single_file(root / "one.safetensors", model, {})
    return root


@pytest.fixture
def copy(root, tmp_path):
    """The SD 1 directory, to be spoilt."""
    return shutil.copytree(root / "sd1", tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_configuration_that_is_no_object_is_named(copy, part):
    (copy / part / "config.json").write_text("[]")
    with pytest.raises(LdmError, match="holds a list, not an object"):
        open_published(copy)


def test_a_configuration_with_a_value_of_another_kind_is_named(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": "two"}))
    with pytest.raises(LdmError, match="configuration cannot be read") as refusal:
        open_published(copy)
    assert str(path) in str(refusal.value)


def test_a_missing_tokenizer_is_no_question_for_the_hub(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(LdmError, match="holds no tokenizer"):
        open_published(copy)


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    ],
)
def test_a_file_without_a_tensor_that_tells_its_shape_is_refused_by_name(root, tmp_path, lost):
    tensors = load_file(root / "one.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "pruned.safetensors")
    with pytest.raises(LdmError, match=lost.removeprefix("first_stage_model.").split(".", 2)[2]):
        open_published(tmp_path / "pruned.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", Options(tokenizer="somewhere")),
        ("sd1", Options(allow_unused=True)),
        ("one.safetensors", Options(variant="fp16")),
    ],
)
def test_options_that_mean_nothing_for_a_model_are_refused(root, name, options):
    with pytest.raises(LdmError, match="means nothing for"):
        Pipeline.from_pretrained(root / name, options=options)


def test_an_empty_negative_prompt_is_a_prompt_where_guidance_compares_with_zeros(root):
    """As in diffusers: only without a negative prompt are SDXL's zeros taken."""
    pipeline = Pipeline.from_pretrained(root / "sdxl", device="cpu")
    theirs = diffusers.DiffusionPipeline.from_pretrained(root / "sdxl")
    theirs.set_progress_bar_config(disable=True)
    x1 = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}
    asked = {"steps": 2, "cfg_scale": 5.0, "size": SIDE, "sampler": "ddim"}
    with torch.no_grad():
        wanted = theirs(
            PROMPT, negative_prompt="", latents=x1.clone(), output_type="pt", **given
        ).images
    got = pipeline._draw_batch(pipeline.requests(PROMPT, negative="", **asked), x1)
    assert_close((got / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-4)


def test_a_lone_codec_takes_the_scale_it_is_given(root, tmp_path):
    inside = "first_stage_model."
    tensors = load_file(root / "one.safetensors")
    alone = {k.removeprefix(inside): v for k, v in tensors.items() if k.startswith(inside)}
    save_file(alone, tmp_path / "vae.safetensors")
    assert open_codec(tmp_path / "vae.safetensors").config.scaling_factor == 0.18215
    xl = open_codec(tmp_path / "vae.safetensors", Options(scaling_factor=0.13025)).config
    assert (xl.scaling_factor, xl.shift_factor) == (0.13025, None)
    flux = open_codec(tmp_path / "vae.safetensors", Options(scaling_factor=0.3611)).config
    assert flux.shift_factor == 0.1159


def test_a_lone_codec_of_16_channels_has_to_be_told_its_scale(tmp_path):
    from ldm.exchange.keymap import kept, to_original
    from ldm.exchange.original import VAE, vae_rows
    from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL

    config = AutoencoderConfig(
        latent_channels=16, block_out_channels=(32,), use_quant_conv=False, layers_per_block=1
    )
    state = AutoencoderKL(config).state_dict()
    rows = to_original(kept(vae_rows(config), state), state)
    save_file({k.removeprefix(VAE): v for k, v in rows.items()}, tmp_path / "v.safetensors")
    with pytest.raises(LdmError, match="16 channels") as refusal:
        open_codec(tmp_path / "v.safetensors")
    assert "1.5305 (SD 3)" in refusal.value.fix


def test_adapters_are_found_where_a_path_has_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=0.5"
    folder.mkdir()
    assert located(str(folder)) == (folder / lora.WEIGHTS, 1.0)
    assert located(f"{folder}=0.25") == (folder / lora.WEIGHTS, 0.25)


@pytest.mark.parametrize("form", ["use_rslora", "use_dora", "lora_bias"])
def test_adapters_that_are_scaled_otherwise_are_refused(form):
    facts = {"unet.r": 4, "unet.lora_alpha": 4, f"unet.{form}": True}
    with pytest.raises(LdmError, match=form):
        lora.stated_alphas({lora.METADATA: json.dumps(facts)}, "file")


def test_alphas_are_read_by_the_ends_of_layer_names():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    tensors = {f"unet.{name}.lora_{x}.weight": torch.ones(*shape) for name in "ab"
               for x, shape in (("A", (1, 3)), ("B", (3, 1)))}  # fmt: skip
    outer = torch.nn.ModuleDict({"mid": net})
    named = {key.replace("unet.", "unet.mid."): value for key, value in tensors.items()}
    read = lora.from_tensors(named, outer, "file", {"": 1.0, "b": 8.0})
    assert {name: one.scale for name, one in read.items()} == {"mid.a": 1.0, "mid.b": 8.0}


def test_safetensors_need_no_conversion(root, tmp_path):
    with pytest.raises(LdmError, match="is no pickle"):
        convert_pickle(root / "one.safetensors", tmp_path / "two.safetensors")
