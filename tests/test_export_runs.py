"""Trained runs of every family are exported as they were trained, or refused with the reason."""

import json

import pytest
import torch
from test_exchange_import import OBJECTIVE, PARTS, pretrained

import ldm  # noqa: F401  (before anything that imports torchvision)
from ldm.errors import LdmError
from ldm.exchange.exporting import Model, plan, write_diffusers, write_single_file
from ldm.inference.comparison import compared
from ldm.inference.pipeline import Pipeline
from ldm.inference.publishing import Wishes, _proven_file, export
from ldm.training.diffusion import train_diffusion
from tests.published import PROMPT, SIDE, pixart, sd1, sd3, sdxl

pytest.importorskip("diffusers")

MMDIT = (
    *("model.kind=mmdit", "model.hidden_size=64", "model.num_layers=2", "model.head_dim=32"),
    "model.pos_embed_max_size=16",
)
PIXART = (
    *("model.kind=dit", "model.diffusers=true", "model.conditioning=adaln_single"),
    *("model.hidden_size=32", "model.num_layers=2", "model.head_dim=16", "model.base_size=8"),
    *("diffusion.process=vp_linear", "diffusion.prediction=eps"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for make in (sd1, sdxl, sd3, pixart):
        make().save_pretrained(root / make.__name__, safe_serialization=True)
    return root


def trained(models, run, family, *more, own=()):
    """A pipeline of a short run on a family's parts; `own` replaces the pretrained denoiser."""
    if own:
        from ldm.config.files import load

        config = pretrained(models / family, run, *PARTS["sd1"], *OBJECTIVE["sd1"])
        assert config.model.kind == "pretrained"
        file = run.parent / f"{run.name}.yaml"
        import yaml

        values = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "model"}
        file.write_text(yaml.safe_dump(values))
        parts = (f"vae.path={models / family}", f"text.path={models / family}")
        quick = ("cache.enabled=false", "text.too_long=truncate")
        config = load([str(file)], [*parts, *quick, *more, *own])
    else:
        config = pretrained(models / family, run, *PARTS[family], *OBJECTIVE[family], *more)
    train_diffusion(config)
    return Pipeline.from_pretrained(run, device="cpu", cpu_kernels="plain")


def model_of(pipeline):
    return Model(pipeline.vae, pipeline.encoder, pipeline.net, pipeline.contract)


def agrees(pipeline, folder):
    folder.mkdir(exist_ok=True)
    exported = write_diffusers(folder, model_of(pipeline))
    agreement = compared(folder, pipeline, exported, PROMPT)
    assert agreement.holds, "\n".join(agreement.lines())
    return exported


def test_a_run_that_compares_with_zeros_says_so_to_diffusers(models, tmp_path):
    agrees(trained(models, tmp_path / "run", "sdxl"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True


def test_zeros_are_refused_where_the_pipeline_embeds_no_words(models, tmp_path):
    pipeline = trained(models, tmp_path / "run", "sd1", "text.zero_null=true")
    with pytest.raises(LdmError, match="zeros"):
        plan(model_of(pipeline))


def test_a_trained_mmdit_is_exported_at_its_own_size(models, tmp_path):
    flow = OBJECTIVE["sd3"]
    run = tmp_path / "run"
    pipeline = trained(models, run, "sd3", *PARTS["sd3"], *flow, own=MMDIT)
    enlivened(pipeline.net)
    agrees(pipeline, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["sample_size"] == SIDE // 2


def test_another_number_of_t5_tokens_is_told_to_the_pipeline(models, tmp_path):
    pipeline = trained(models, tmp_path / "run", "sd3", "text.t5_tokens=77")
    exported = agrees(pipeline, tmp_path / "out")
    assert any("max_sequence_length=77" in note for note in exported.notes)
    export(str(tmp_path / "run"), tmp_path / "card", Wishes(prompts=[PROMPT]))
    assert "max_sequence_length=77" in (tmp_path / "card" / "usage.py").read_text()


def test_a_trained_dit_in_the_form_of_pixart_is_exported(models, tmp_path):
    run = tmp_path / "run"
    pipeline = trained(models, run, "pixart", "text.lower_case=true", own=PIXART)
    enlivened(pipeline.net)
    assert agrees(pipeline, tmp_path / "out").pipeline == "PixArtAlphaPipeline"
    pipeline.encoder.reading = type(pipeline.encoder.reading)()
    with pytest.raises(LdmError, match="lower case"):
        plan(model_of(pipeline))


def enlivened(net):
    """Fresh last layers are 0: they have to say something to be compared."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            if not value.any():
                value.normal_(std=0.05)


def test_a_difference_in_a_text_encoder_of_a_single_file_is_found(models, tmp_path):
    pipeline = Pipeline.from_pretrained(models / "sd1", device="cpu", cpu_kernels="plain")
    write_single_file(tmp_path / "one.safetensors", model_of(pipeline), {})
    _proven_file(tmp_path / "one.safetensors", model_of(pipeline), pipeline)
    with torch.no_grad():
        next(pipeline.encoder.model.parameters()).add_(1)
    with pytest.raises(LdmError, match="does not hold"):
        _proven_file(tmp_path / "one.safetensors", model_of(pipeline), pipeline)


def test_any_title_gives_a_file_and_a_program_that_runs(models, tmp_path):
    wishes = Wishes("single-file", prompts=[PROMPT], title='A/B "v1.5"')
    said = export(str(models / "sd1"), tmp_path / "out", wishes)
    assert (tmp_path / "out" / "A-B -v1.5-.safetensors").is_file()
    code = (tmp_path / "out" / "usage.py").read_text()
    compile(code, "usage.py", "exec")
    assert 'tokenizer="tokenizers"' in code
    assert any("vocabulary of its own" in line for line in said)
