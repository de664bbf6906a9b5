"""The shape of the house: layering, light imports, ceilings, and what the code must not hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm"

FOUNDATION = {"ldm", "ldm.types", "ldm.errors", "ldm.storage", "ldm.randomness"}
TABLES = ("names", "process", "prediction", "samplers", "schedule", "weighting")  # without torch
CONFIG = {"ldm.config", *(f"ldm.diffusion.{table}" for table in TABLES)}
MAY_IMPORT = {
    "ldm.types": {"ldm.types", "ldm.errors"},
    "ldm.errors": set(),
    "ldm.randomness": {"ldm.errors"},
    "ldm.storage": {"ldm.storage", "ldm.errors"},
    "ldm.config": FOUNDATION | CONFIG,
    "ldm.arguments": FOUNDATION | CONFIG,
    "ldm.diffusion": FOUNDATION | {"ldm.diffusion"},
    "ldm.models": FOUNDATION | {"ldm.models"},
    "ldm.data": FOUNDATION | {"ldm.data"},
    "ldm.checkpoint": FOUNDATION | {"ldm.checkpoint"},
    "ldm.exchange": FOUNDATION
    | CONFIG
    | {"ldm.exchange", "ldm.checkpoint", "ldm.diffusion", "ldm.models"},
    "ldm.build": FOUNDATION
    | CONFIG
    | {"ldm.exchange", "ldm.diffusion", "ldm.models", "ldm.data", "ldm.checkpoint"},
    "ldm.model_info": FOUNDATION | CONFIG | {"ldm.build", "ldm.checkpoint", "ldm.models"},
    "ldm.verification": FOUNDATION | {"ldm.verification", "ldm.diffusion"},
    "ldm.inference": FOUNDATION
    | {"ldm.inference", "ldm.build", "ldm.exchange", "ldm.checkpoint"}
    | {"ldm.diffusion", "ldm.models", "ldm.data"},
    "ldm.evaluation": FOUNDATION
    | {"ldm.evaluation", "ldm.inference", "ldm.build", "ldm.checkpoint"}
    | {"ldm.diffusion", "ldm.models", "ldm.data"},
    "ldm.training": FOUNDATION
    | CONFIG
    | {"ldm.training", "ldm.evaluation", "ldm.inference", "ldm.build", "ldm.exchange"}
    | {"ldm.checkpoint"}
    | {"ldm.diffusion", "ldm.models", "ldm.data"},
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def ldm_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ldm"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm"):
            assert node.level == 0, f"{path}: relative import"
            is_room = (PACKAGE.parent / Path(*node.module.split("."))).is_dir()
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                file = ROOT / Path(*inner.split("."))
                exists = file.with_suffix(".py").exists() or file.is_dir()
                yield inner if is_room and exists else node.module


def violations(room, imports):
    return [
        name
        for name in imports
        if not any(
            name == allowed or (allowed != "ldm" and name.startswith(f"{allowed}."))
            for allowed in MAY_IMPORT[room]
        )
    ]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_the_rooms_below_it(path):
    room = ".".join(name_of(path).split(".")[:2])
    if room in ("ldm", "ldm.__main__", "ldm.cli", "ldm.commands", "ldm.demo"):  # sees everything
        return
    assert violations(room, ldm_imports(path)) == []


def test_the_layering_test_sees_a_forbidden_import():
    assert violations("ldm.diffusion", ["ldm.models.unet"]) == ["ldm.models.unet"]
    assert violations("ldm.models", ["ldm.diffusion.core", "ldm.types"]) == ["ldm.diffusion.core"]
    assert violations("ldm.inference", ["ldm.training.ema"]) == ["ldm.training.ema"]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_and_functions_stay_under_their_ceilings(path):
    text = path.read_text()
    assert text.count("\n") <= 420, "split it by concept"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 100, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_module_unpickles_evaluates_or_runs_a_shell(path):
    banned = {"pickle", "torch.load", "yaml.load", "eval", "exec", "os.system", "extractall"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if name_of(path) == "ldm.checkpoint.pickles" and is_restricted_load(node):
                continue
            assert ast.unparse(node.func) not in banned
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("trust_remote_code", "shell") and is_true)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {"pickle", "cPickle", "dill", "cloudpickle"} & set(names)


def is_restricted_load(call):
    """torch.load that yields tensors only: the one file that may read published pickles."""
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
    return ast.unparse(call.func) == "torch.load" and keywords.get("weights_only") == "True"


def loaded_after(*code):
    script = "; ".join([*code, "import sys; print(' '.join(sys.modules))"])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "diffusers", "datasets", "accelerate", "scipy", "matplotlib"}


def test_importing_ldm_loads_nothing_heavy():
    assert not HEAVY & loaded_after("import ldm")


def test_reading_a_configuration_loads_nothing_heavy():
    loaded = loaded_after(
        "from ldm.config.files import load", "load(['configs/tiny/dit.yaml'], ['train.steps=30'])"
    )
    assert "pydantic" in loaded
    assert not HEAVY & loaded


def test_help_and_configuration_errors_come_without_torch():
    code = (
        "import contextlib, io, ldm.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    ldm.cli.main(['--help'])\n"
        "assert ldm.cli.main(['train-diffusion', 'configs/tiny/dit.yaml', 'train.stepz=1']) == 78\n"
        "import sys; print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_importing_ldm_takes_less_than_100_ms():
    code = "import time; t = time.process_time(); import ldm; print(time.process_time() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(runs) < 0.1
