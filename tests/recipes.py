"""Small experiments for tests: seconds on one core, every part of the real path."""

from pathlib import Path

from safetensors.torch import load_file

from ldm.config.files import load

ROOT = Path(__file__).parent.parent
TINY = {
    "vae": ROOT / "configs/tiny/vae.yaml",
    "dit": ROOT / "configs/tiny/dit.yaml",
    "mmdit": ROOT / "configs/tiny/mmdit.yaml",
    "unet": ROOT / "configs/tiny/unet.yaml",
}
QUICK = (
    "train.steps=6",
    "optim.warmup_steps=2",
    "run.save_every_steps=2",
    "run.log_every_steps=1",
    "preview.every_steps=0",
    "data.count=24",
    "train.batch_size=4",
    "run.tensorboard=false",
)


def tiny(name, run_dir, *overrides):
    """A tiny experiment in `run_dir`, six steps long."""
    extra = [f"run.dir={run_dir}", *QUICK]
    if name != "vae":
        extra += [f"cache.dir={Path(run_dir).parent / 'cache'}", "cache.shard_size=8"]
    return load([str(TINY[name])], [*extra, *overrides])


def state(checkpoint):
    """All tensors of a checkpoint: resume state and published weights."""
    return {
        f"{path.relative_to(checkpoint)}:{key}": value
        for path in sorted(Path(checkpoint).rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def assert_bitwise_equal(one, two):
    """Two checkpoints hold the same tensors, bit for bit."""
    first, second = state(one), state(two)
    assert first.keys() == second.keys()
    assert len(first) > 20
    differing = [key for key in first if not first[key].equal(second[key])]
    assert differing == []
