"""Configuration: every mistake at once, each with its place, its rule and a legal value."""

import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ldm.config.files import dump, load, refuse_another_experiment
from ldm.config.schema import STAGES, DiffusionExperiment, Section
from ldm.errors import ExitCode, LdmError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "e.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def message(paths, overrides=(), **kwargs):
    with pytest.raises(LdmError) as caught:
        load(paths, overrides, **kwargs)
    assert caught.value.code == ExitCode.CONFIG
    return str(caught.value)


MINIMAL = "stage: diffusion\nrun:\n  dir: runs/x\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_configuration_is_valid_and_states_what_to_expect(path):
    load([str(path)])
    assert path.read_text().startswith("#"), "the header says hardware, time and what to expect"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_dumped_configuration_loads_to_an_equal_one(path, tmp_path):
    config = load([str(path)])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load([str(copy)]) == config


def test_an_unknown_key_names_the_nearest_and_its_line(tmp_path):
    path = write(tmp_path, MINIMAL + "optim:\n  lerning_rate: 1\n")
    text = message([path])
    assert f"{path}:5: unknown key optim.lerning_rate; did you mean optim.learning_rate?" in text


def test_an_unknown_key_in_the_wrong_section_is_found_elsewhere(tmp_path):
    text = message([write(tmp_path, MINIMAL)], ["train.learning_rate=1"])
    assert "unknown key train.learning_rate; did you mean optim.learning_rate?" in text


def test_all_mistakes_come_at_once_field_errors_and_rules_alike(tmp_path):
    path = write(tmp_path, MINIMAL + "train:\n  steps: many\n  batch_size: 10\n")
    text = message(
        [path],
        ["train.accumulation=3", "optim.learning_rate=-1", "diffusion.prediction=eps", "x=1"],
    )
    for part in (
        "5 mistakes",
        f"{path}:5: train.steps: got 'many'",
        "train.batch_size: 10 cannot be split",
        "optim.learning_rate: got -1; must be greater than 0; a legal value is 0.0001",
        "diffusion.prediction: eps cannot be used with diffusion.process=rectified_flow",
        "unknown key x",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=0", "greater than or equal to 1"),
        ("train.steps=true", "boolean"),
        ("train.steps=1.5", "valid integer"),
        ("train.ema_decay=1", "less than 1"),
        ("optim.learning_rate=nan", "finite"),
        ("diffusion.process=vpp", "one of rectified_flow"),
        ("sample.sampler=plmz", "one of ddim"),
        ("model.kind=resnet", "kind"),
        ("data.source=imagefolder", "needs a path"),
        ("data.path=somewhere", "reads no path"),
        ("data.flip=true", "left and right"),
        ("data.image_px=60", "48 or 64"),
        ("model.hidden_size=100", "not a multiple of model.head_dim=64"),
        ("optim.warmup_steps=5000", "more than train.steps"),
        ("sample.interval=[1.0, 0.5]", "empty"),
        ("diffusion.caption_dropout=0", "guidance"),
        ("data.crop=random", "cannot be random"),
        ("model.head_dim=33", "not a multiple of 4"),
        ("run.dir=", "run.dir: got ''; must be given, not empty"),
        ("vae.random.block_out_channels=[]", "must be given, not empty"),
        ("sample.interval=[0.5]", "too few values; a legal value is [0.0, 1.0]"),
        ("optim=3", "must be a section: write optim.NAME=VALUE"),
        ("model=3", "must be a section: write model.NAME=VALUE"),
        ("data.pairs=", "data.pairs: got ''; must be given, not empty; a legal value is null"),
        ("diffusion.timesteps.mean=.nan", "finite number; a legal value is null"),
        ("diffusion.timesteps.stratified=perhaps", "unknown key diffusion.timesteps.stratified"),
    ],
)
def test_a_bad_value_is_refused_with_its_rule(tmp_path, override, part):
    text = message([write(tmp_path, MINIMAL)], [override])
    assert part in text
    assert "command line: " in text or "e.yaml:" in text


def test_a_section_that_is_a_plain_value_is_one_mistake(tmp_path):
    assert "optim.warmup_steps" not in message([write(tmp_path, MINIMAL)], ["optim=3"])


@pytest.mark.parametrize(
    "override",
    [
        "optim.beta2=0.5",
        "optim.schedule=linear",
        "data.too_small=error",
        "data.workers=3",
        "train.compile=true",
        "train.ema_decay=0.5",
        "train.max_bad_steps=9",
    ],
)
def test_train_clip_refuses_what_it_would_ignore(tmp_path, override):
    text = message([write(tmp_path, "stage: clip\nrun:\n  dir: runs/x\n")], [override])
    assert f"{override.partition('=')[0]}: train-clip cannot do" in text


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(tmp_path):
    assert (
        load([write(tmp_path, MINIMAL)], ["optim.learning_rate=3e-4"]).optim.learning_rate == 3e-4
    )


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path):
    text = message([write(tmp_path, MINIMAL + "run:\n  dir: b\n")])
    assert "run is given twice (first on line 2)" in text


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "just words\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    assert "e.yaml" in message([write(tmp_path, text)])


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, MINIMAL)
    assert "did you mean" in message([str(tmp_path / "ee.yaml")])


def test_the_wrong_stage_names_the_right_script(tmp_path):
    assert "train_diffusion.py" in message([write(tmp_path, MINIMAL)], stage="vae")


def test_later_files_and_then_overrides_win(tmp_path):
    first = write(tmp_path, MINIMAL + "train: {steps: 5, seed: 1}\n")
    second = tmp_path / "b.yaml"
    second.write_text("train: {steps: 200}\n")
    config = load([first, str(second)], ["train.seed=9"])
    assert (config.train.steps, config.train.seed) == (200, 9)


def test_experiments_are_immutable(tmp_path):
    config = load([write(tmp_path, MINIMAL)])
    with pytest.raises(ValidationError):
        config.train.steps = 3


def sections(kind):
    yield kind
    for info in kind.model_fields.values():
        for found in [info.annotation, *getattr(info.annotation, "__args__", ())]:
            if isinstance(found, type) and issubclass(found, Section):
                yield from sections(found)


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_documented(stage):
    for section in sections(STAGES[stage]):
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name}"


def test_a_resume_may_change_the_rhythm_but_not_the_experiment(tmp_path):
    config = load([write(tmp_path, MINIMAL)])
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(config))
    refuse_another_experiment(stored, load([write(tmp_path, MINIMAL)], ["train.steps=2000"]))
    with pytest.raises(LdmError, match=r"diffusion.process: 'rectified_flow' -> 'vp_cosine'"):
        refuse_another_experiment(
            stored, load([write(tmp_path, MINIMAL)], ["diffusion.process=vp_cosine"])
        )


def test_a_run_from_before_a_key_of_the_denoiser_goes_on_with_its_default_only(tmp_path):
    values = yaml.safe_load(dump(load([write(tmp_path, MINIMAL)])))
    for key in ("conditioning", "positions", "base_size", "rope_scaling", "diffusers", "masking"):
        del values["model"][key]
    for key in ("classes", "further_paths"):
        del values["text"][key]
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(values))
    refuse_another_experiment(stored, load([write(tmp_path, MINIMAL)]))
    with pytest.raises(LdmError, match=r"configuration: model.positions: 'sincos' -> 'rope'\n"):
        refuse_another_experiment(
            stored, load([write(tmp_path, MINIMAL)], ["model.positions=rope"])
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ("model.masking.knd=route", "did you mean model.masking.kind?"),
        ("model.hidden_size=a", "model.hidden_size: got 'a'; must be a valid integer"),
        ("model.hidden_size=a", "a legal value is 384"),
        ("model={kind: pretrained, path: 3}", "model.path: got 3; must be a valid string"),
        ("model={kind: pretrained}", "model.path is missing"),
        ("model={kind: unet, heads: a}", "model.heads: got 'a'; must be a valid integer"),
        (
            "model={kind: unet, patch_size: 2}",
            "unknown key model.patch_size; it belongs to another model.kind",
        ),
    ],
)
def test_mistakes_inside_a_denoiser_are_named_by_their_plain_key(tmp_path, override, message):
    with pytest.raises(LdmError) as caught:
        load([write(tmp_path, MINIMAL)], [override])
    assert message in str(caught.value)
    assert "function-" not in str(caught.value)


FORMERLY = "mean: 0.0, std: 1.0, shift: 1.0"
"""Written into every stored configuration, whatever the law."""


@pytest.mark.parametrize(
    ("former", "now"),
    [
        (f"distribution: uniform, stratified: true, {FORMERLY}", "placement: stratified"),
        (f"stratified: false, {FORMERLY}", "placement: independent"),
        (f"distribution: logit_normal, stratified: true, {FORMERLY}", "distribution: logit_normal"),
        (f"distribution: edm, stratified: true, {FORMERLY}", "distribution: edm"),
        (
            "distribution: logit_normal, stratified: false, mean: 0.5, std: 1.0",
            "distribution: logit_normal, placement: independent, mean: 0.5",
        ),
        ("distribution: mode, mean: 0.0, std: 1.0", "distribution: mode"),
    ],
)
def test_keys_of_earlier_versions_mean_what_they_meant(tmp_path, former, now):
    values = f"{MINIMAL}diffusion:\n  timesteps: {{%s}}\n"
    other = load([write(tmp_path, values % "placement: quasi")])
    config = load([write(tmp_path, values % now)])
    path = Path(write(tmp_path, values % former))
    assert load([str(path)]) == config
    stored = yaml.safe_load(dump(config))
    stored["diffusion"]["timesteps"] = yaml.safe_load(f"{{{former}}}")
    path.write_text(yaml.safe_dump(stored))
    refuse_another_experiment(path, config)
    with pytest.raises(LdmError, match="diffusion.timesteps.placement"):
        refuse_another_experiment(path, other)


def test_a_mean_of_zero_is_heeded_where_the_law_reads_it(tmp_path):
    told = ["diffusion.timesteps.distribution=edm", "diffusion.timesteps.mean=0"]
    assert load([write(tmp_path, MINIMAL)], told).diffusion.timesteps.mean == 0
    both = ["diffusion.timesteps.placement=quasi", "diffusion.timesteps.stratified=true"]
    assert "unknown key diffusion.timesteps.stratified" in message([write(tmp_path, MINIMAL)], both)


@given(st.integers(1, 10_000), st.floats(1e-8, 10.0), st.booleans())
def test_any_valid_value_survives_a_round_trip(steps, rate, shown):
    config = DiffusionExperiment.model_validate(
        {
            "run": {"dir": "r", "tensorboard": shown},
            "train": {"steps": steps},
            "optim": {"learning_rate": rate},
        }
    )
    assert DiffusionExperiment.model_validate(yaml.safe_load(dump(config))) == config
