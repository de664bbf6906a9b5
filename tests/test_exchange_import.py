"""Published models opened here draw what diffusers draws with them, and can be trained on."""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.cli import main
from ldm.diffusion.process import PROCESSES
from ldm.errors import LdmError
from ldm.exchange import schedulers
from ldm.exchange.exporting import Model, write_diffusers
from ldm.exchange.opening import Options, open_denoiser, open_published
from ldm.exchange.sources import is_published
from ldm.inference.comparison import compared
from ldm.inference.pipeline import Pipeline
from ldm.training.diffusion import train_diffusion
from tests.published import FAMILIES, NEGATIVE, PROMPT, SIDE, flux, pixart
from tests.recipes import tiny

diffusers = pytest.importorskip("diffusers")

STEPS, CFG = 5, 5.0
PIXELS = {"rtol": 0, "atol": 1e-4}
"""The bound of the issue; measured 4e-6, the rounding of a float32 table of noise levels."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The four families as diffusers writes them, and the pipelines that wrote them."""
    root, made = tmp_path_factory.mktemp("published"), {}
    for name, make in FAMILIES.items():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / name, safe_serialization=True)
        made[name] = (root / name, pipe)
    return made


def noise(channels):
    shape = (1, channels, SIDE // 2, SIDE // 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def theirs(pipe, x1, **options):
    with torch.no_grad():
        return pipe(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=CFG,
            height=SIDE,
            width=SIDE,
            latents=x1.clone(),
            output_type="pt",
            **options,
        ).images


def ours(pipeline, x1, **settings):
    request = pipeline.requests(PROMPT, steps=STEPS, cfg_scale=CFG, size=SIDE, **settings)
    return (pipeline._draw_batch(request, x1) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_is_that_of_diffusers(saved, family, negative):
    folder, pipe = saved[family]
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    x1 = noise(pipeline.contract.latent_channels)
    options, settings = {}, {"sampler": "ddim"}
    if family == "sd3":  # its default grid moves its end twice; equal sigmas are compared
        options = {"sigmas": [1 - i / STEPS for i in range(STEPS)]}
        settings = {"sampler": "euler", "spacing": "uniform"}
    if negative is not None:
        options["negative_prompt"], settings["negative"] = negative, negative
    assert_close(ours(pipeline, x1, **settings), theirs(pipe, x1, **options), **PIXELS)


def test_pixart_draws_what_diffusers_draws_and_goes_back(tmp_path):
    pipe = pixart()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "in", safe_serialization=True)
    pipeline = Pipeline.from_pretrained(tmp_path / "in", device="cpu", cpu_kernels="plain")
    assert pipeline.contract.process == "vp_linear"
    assert pipeline.contract.learned_variance
    x1 = noise(4)
    plain = {"use_resolution_binning": False, "clean_caption": False}
    picture = theirs(pipe, x1, **plain)
    assert_close(ours(pipeline, x1, sampler="ddim"), picture, **PIXELS)
    model = Model(pipeline.vae, pipeline.encoder, pipeline.net, pipeline.contract)
    (tmp_path / "out").mkdir()
    exported = write_diffusers(tmp_path / "out", model)
    assert exported.pipeline == "PixArtAlphaPipeline"
    agreement = compared(tmp_path / "out", pipeline, exported, PROMPT)
    assert agreement.holds, agreement.lines()


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_flux_draws_what_diffusers_draws(tmp_path, negative):
    """Through the adapter: packed latents, T5's states with CLIP's pooled vector, told guidance."""
    pipe = flux()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "flux", safe_serialization=True)
    pipeline = Pipeline.from_pretrained(tmp_path / "flux", device="cpu")
    assert pipeline.encoder.style == "flux"
    assert pipeline.contract.image_sizes == ((256, 256),)  # 128 latents of this tiny codec
    x1, cfg = noise(16), 1.0 if negative is None else CFG
    packed = pipe._pack_latents(x1, 1, 16, SIDE // 2, SIDE // 2)
    with torch.no_grad():
        picture = pipe(
            PROMPT,
            negative_prompt=negative,
            true_cfg_scale=cfg,
            num_inference_steps=STEPS,
            height=SIDE,
            width=SIDE,
            latents=packed,
            output_type="pt",
        ).images
    request = pipeline.requests(
        PROMPT,
        negative=negative,
        steps=STEPS,
        cfg_scale=cfg,
        size=SIDE,
        sampler="euler",
        spacing="uniform",
    )
    drawn = (pipeline._draw_batch(request, x1) / 2 + 0.5).clamp(0, 1)
    assert_close(drawn, picture, **PIXELS)


def test_a_long_prompt_of_flux_is_read_by_t5_and_cut_for_clip(tmp_path):
    flux().save_pretrained(tmp_path / "flux", safe_serialization=True)
    encoder = Pipeline.from_pretrained(tmp_path / "flux", device="cpu").encoder
    words = " ".join(["red"] * 90)
    assert encoder.max_tokens == 512
    one, other = encoder([words]), encoder([f"{words} circle"])
    assert not torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_what_was_imported_is_exported_again(saved, family, tmp_path):
    pipeline = Pipeline.from_pretrained(saved[family][0], device="cpu", cpu_kernels="plain")
    model = Model(pipeline.vae, pipeline.encoder, pipeline.net, pipeline.contract)
    exported = write_diffusers(tmp_path, model)
    agreement = compared(tmp_path, pipeline, exported, PROMPT)
    assert agreement.holds, agreement.lines()
    assert agreement.values > 1


def test_prompts_and_guidance_matter_in_these_models(saved):
    """Otherwise equal pictures would prove little."""
    for family, (folder, _) in saved.items():
        pipeline = Pipeline.from_pretrained(folder, device="cpu")
        x1 = noise(pipeline.contract.latent_channels)
        one = ours(pipeline, x1)
        other = (
            pipeline._draw_batch(
                pipeline.requests("two green triangles", steps=STEPS, cfg_scale=1.0, size=SIDE), x1
            )
            / 2
            + 0.5
        ).clamp(0, 1)
        assert (one - other).abs().max() > 1e-2, family


@pytest.mark.parametrize(
    ("family", "process", "prediction", "spacing"),
    [
        ("sd1", "sd", "eps", "leading"),
        ("sd2", "sd", "v", "leading"),
        ("sdxl", "sd", "eps", "leading"),
        ("sd3", "rectified_flow", "flow", "linear"),
    ],
)
def test_the_contract_says_what_the_files_say(saved, family, process, prediction, spacing):
    found = open_published(saved[family][0]).contract
    assert (found.process, found.prediction) == (process, prediction)
    assert found.sampling["spacing"] == spacing
    assert found.image_sizes == ((SIDE, SIDE),)
    assert found.mask_rule == "padding is attended like words"


def test_sdxl_without_a_negative_prompt_is_compared_with_zeros(saved):
    null = open_published(saved["sdxl"][0]).null
    assert not null.tokens.any()
    assert not null.pooled.any()


def test_half_precision_variants_and_shards_are_read(saved, tmp_path):
    _, pipe = saved["sd1"]
    pipe.unet.half().save_pretrained(tmp_path / "half" / "unet", variant="fp16")
    pipe.unet.float().save_pretrained(tmp_path / "cut" / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "cut" / "unet").glob("*.safetensors"))) > 1
    whole = dict(pipe.unet.state_dict())
    for part, options in (("half", Options(variant="fp16")), ("cut", Options())):
        net = open_denoiser(tmp_path / part, options)
        for name, value in net.state_dict().items():
            assert value.dtype == torch.float32
            assert_close(value, whole[name], rtol=1e-3, atol=1e-6)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved["sd1"][0], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(LdmError, match="pickle") as refusal:
        open_denoiser(folder)
    assert "ldm convert" in refusal.value.fix


def test_a_missing_weight_is_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(saved["sd1"][0], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.more"] = tensors.pop("conv_in.bias")
    save_file(tensors, weights)
    with pytest.raises(LdmError, match=r"1 missing \(conv_in.bias\); 1 unknown \(conv_in.more\)"):
        open_denoiser(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}, "squaredcos"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 50}, "num_train_timesteps=50"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "other"}, "prediction_type=other"),
    ],
)
def test_what_the_contract_cannot_express_is_refused_by_name(config, said):
    with pytest.raises(LdmError, match=said):
        schedulers.read(config, "scheduler_config.json")


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_schedulers_are_read_as_what_they_are():
    zero = schedulers.read(
        {"_class_name": "DDIMScheduler", **SCALED, "rescale_betas_zero_snr": True}, ""
    )
    assert zero.process == "sd_zero_snr"
    assert (
        schedulers.read({"_class_name": "DPMSolverMultistepScheduler"}, "").process == "vp_linear"
    )
    flux = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    read = schedulers.read(flux, "", tokens=4096)
    assert read.shift == pytest.approx(3.158, abs=1e-3)  # exp(1.15)
    sana = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    read = schedulers.read({"_class_name": "DPMSolverMultistepScheduler", **sana}, "")
    assert (read.process, read.prediction, read.shift) == ("rectified_flow", "flow", 3.0)


@pytest.mark.parametrize("process", schedulers.TABLES)
def test_the_tables_are_those_of_diffusers(process):
    config = dict(schedulers.written(process, "v", "ddim", shift=1.0).config)
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, _ = PROCESSES[process].coefficients(t)
    assert_close(alpha.square(), theirs, rtol=2e-4, atol=1e-7)  # theirs is a float32 product
    assert schedulers.read(config, "").process == process


def test_runs_are_no_published_models(tmp_path):
    assert not is_published(tmp_path / "run/step-0001")
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert not is_published(tmp_path)
    assert is_published("owner/name")


def test_an_unknown_hub_id_is_refused_offline():
    with pytest.raises(LdmError, match="HF_HUB_OFFLINE"):
        Pipeline.from_pretrained("nobody/nothing-of-the-kind")


PARTS = {
    "sd1": ("text.padding=attended",),
    "sd2": ("text.padding=attended",),
    "sdxl": ("text.style=sdxl", "text.padding=attended", "text.zero_null=true"),
    "sd3": ("text.style=sd3", "text.padding=attended", "text.t5_width=128"),
}
OBJECTIVE = {
    "sd1": ("diffusion.process=sd", "diffusion.prediction=eps"),
    "sd2": ("diffusion.process=sd", "diffusion.prediction=v"),
    "sdxl": ("diffusion.process=sd", "diffusion.prediction=eps"),
    "sd3": ("diffusion.process=rectified_flow", "diffusion.prediction=flow"),
}


def pretrained(folder, run, *overrides):
    """A tiny experiment that begins with all parts of a published model."""
    experiment = tiny("unet", run)
    values = json.loads(experiment.model_dump_json())
    values["model"] = {"kind": "pretrained", "path": str(folder)}
    import yaml

    file = run.parent / f"{run.name}.yaml"
    values["train"]["steps"] = values["run"]["save_every_steps"] = 2
    values["diffusion"].pop("coupling_condition_weight")
    file.write_text(yaml.safe_dump(values))
    from ldm.config.files import load

    own = [f"vae.path={folder}", f"text.path={folder}", "cache.enabled=false"]
    own.append("text.too_long=truncate")
    return load([str(file)], [*own, *overrides])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_a_published_model(saved, family, tmp_path):
    folder, _ = saved[family]
    config = pretrained(
        folder, tmp_path / "run", *PARTS[family], *OBJECTIVE[family], "optim.learning_rate=1e-9"
    )
    train_diffusion(config)
    before, after = open_denoiser(folder), Pipeline.from_pretrained(tmp_path / "run", device="cpu")
    for name, value in after.net.state_dict().items():  # two steps of size 1e-9
        assert_close(value, before.state_dict()[name], rtol=0, atol=1e-7, msg=name)
    assert any(
        not value.equal(before.state_dict()[name]) for name, value in after.net.state_dict().items()
    )
    drawn = after.requests(PROMPT, steps=2, size=SIDE)
    assert len(after.draw(drawn)) == 1


def test_training_goes_on_from_flux_through_the_adapter(tmp_path):
    folder = tmp_path / "flux"
    flux().save_pretrained(folder, safe_serialization=True)
    parts = ("text.style=flux", "text.padding=attended", "text.t5_tokens=120")
    flow = OBJECTIVE["sd3"]
    train_diffusion(pretrained(folder, tmp_path / "run", *parts, *flow))
    before, after = open_denoiser(folder), Pipeline.from_pretrained(tmp_path / "run", device="cpu")
    state = before.state_dict()
    assert any(not value.equal(state[name]) for name, value in after.net.state_dict().items())
    assert len(after(PROMPT, steps=2, size=SIDE, cfg_scale=1.0)) == 1


def test_another_objective_than_the_weights_had_is_refused(saved, tmp_path):
    folder, _ = saved["sd1"]
    wrong = ("text.padding=attended", "diffusion.process=sd", "diffusion.prediction=v")
    with pytest.raises(LdmError, match="predicts eps on process sd"):
        train_diffusion(pretrained(folder, tmp_path / "run", *wrong))


def test_parts_that_do_not_fit_are_refused_with_those_that_do(saved, tmp_path):
    folder, _ = saved["sd1"]
    config = pretrained(folder, tmp_path / "run", *OBJECTIVE["sd1"], f"text.path={saved['sd2'][0]}")
    with pytest.raises(LdmError, match="reads text of width 32, the encoder gives 64"):
        train_diffusion(config)


def test_the_command_draws_with_a_published_model(saved, tmp_path):
    arguments = ["infer", "--model", str(saved["sd1"][0]), "--prompt", PROMPT, "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    (drawn,) = tmp_path.glob("*.png")
    assert main(["replay", str(drawn), "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("*.png")
    assert again.read_bytes() == drawn.read_bytes()
