"""What each command of `ldm` does with its parsed arguments; imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm import arguments
from ldm.errors import ExitCode, LdmError

STAGES = {"train-vae": "vae", "train-clip": "clip", "train-diffusion": "diffusion"}
INFER_SETTINGS = (
    *("steps", "sampler", "spacing", "eta", "guidance", "rescale", "threshold"),
    *("threshold_limit", "apg_eta", "apg_norm", "apg_momentum", "weighting"),
)
"""Options of `ldm infer` that are settings of the pipeline, under the same name."""


def config_show(args: argparse.Namespace) -> None:
    """`ldm config show`."""
    from ldm.config.files import dump, load

    print(dump(load(args.config, args.overrides)), end="")


def train(args: argparse.Namespace) -> None:
    """`ldm train-vae`, `train-clip`, `train-diffusion`."""
    config = _load(args, STAGES[args.command])
    if config.stage == "vae":
        from ldm.training.vae import train_vae

        print(train_vae(config))
    elif config.stage == "clip":
        from ldm.training.clip_run import train_clip_run

        print(train_clip_run(config))
    else:
        from ldm.training.diffusion import train_diffusion

        print(train_diffusion(config))


def cache(args: argparse.Namespace) -> None:
    """`ldm cache`."""
    config = _load(args, "diffusion")
    from ldm.training.cache import cache_run

    for folder in cache_run(config):
        print(folder)


def infer(args: argparse.Namespace) -> None:
    """`ldm infer`."""
    prompts = _prompts(args)
    size = None if args.size is None else _size(args.size)
    from tqdm.auto import tqdm

    from ldm.inference.images import grid, writable_folder

    for folder in [args.out, *([Path(args.grid).parent] if args.grid else [])]:
        writable_folder(Path(folder))
    from ldm.inference.guiding import refuse_unused
    from ldm.inference.pipeline import Pipeline
    from ldm.models.tiling import check_strips

    refuse_unused(args.guidance, guide=args.guide is not None)
    options = _published(args)
    kernels = {"attention": args.attention, "cpu_kernels": args.cpu_kernels}
    pipeline = Pipeline.from_pretrained(
        args.model, device=args.device, options=options, lora=args.lora, **kernels
    )
    if args.guide is not None:
        pipeline = pipeline.guided_by(
            guide=Pipeline.from_pretrained(args.guide, device=args.device)
        )
    check_strips(pipeline.vae, args.vae_tile)
    pipeline.vae_tile_px = args.vae_tile
    asked = {name: getattr(args, name) for name in INFER_SETTINGS} | {"cfg_scale": args.cfg}
    asked["interval"] = None if args.interval is None else tuple(args.interval)
    requests = pipeline.requests(
        prompts,
        negative=args.negative,
        n=args.n,
        seed=args.seed,
        size=size,
        **{name: value for name, value in asked.items() if value is not None},
    )
    for request in requests:
        pipeline.check(request)
    drawn = []
    step = max(1, args.batch_size)
    with tqdm(total=len(requests), unit="image", disable=None) as bar:
        # saved batch by batch: what is interrupted keeps what it has drawn
        for begin in range(0, len(requests), step):
            pictures = pipeline.draw(requests[begin : begin + step], batch_size=args.batch_size)
            for path in pictures.save(args.out):
                print(path, flush=True)
            drawn += list(pictures)
            bar.update(len(pictures))
    if args.grid:
        from ldm.storage import write_file

        write_file(Path(args.grid), lambda path: grid(drawn).save(path, format="PNG"))
        print(args.grid)


def export(args: argparse.Namespace) -> None:
    """`ldm export`."""
    from ldm.inference.publishing import Wishes, push
    from ldm.inference.publishing import export as write

    wishes = Wishes(
        args.to,
        args.verify,
        tuple(args.prompt or ()),
        args.license,
        args.title,
        _published(args),
    )
    print("\n".join(write(args.model, Path(args.out), wishes)))
    if args.push:
        print(push(Path(args.out), args.push))


def convert(args: argparse.Namespace) -> None:
    """`ldm convert`."""
    from ldm.checkpoint.pickles import convert_pickle

    count = convert_pickle(Path(args.source), Path(args.target))
    print(f"{count} tensors in {args.target}")


def translate(args: argparse.Namespace) -> None:
    """`ldm translate`."""
    from PIL import Image

    from ldm.data.decode import decode
    from ldm.inference.images import writable_folder
    from ldm.inference.pipeline import Pipeline

    writable_folder(Path(args.out))
    pictures = [Image.fromarray(decode(Path(name))) for name in args.pictures]
    pipeline = Pipeline.from_pretrained(args.model, device=args.device)
    asked = {"negative": args.negative, "seed": args.seed, "batch_size": args.batch_size}
    asked |= arguments.settings(args)
    for path in pipeline.translate(pictures, args.prompt, **asked).save(args.out):
        print(path)


def reflow(args: argparse.Namespace) -> None:
    """`ldm reflow`."""
    if args.captions and args.config:
        raise LdmError(
            "captions are taken from a file or from an experiment, not from both",
            where="--captions",
            fix="leave out --captions or --config",
        )
    captions = _lines(Path(args.captions)) if args.captions else None
    if args.config:
        from ldm.build import open_data
        from ldm.config.files import load

        captions = list(open_data(load([args.config], stage="diffusion").data)[0].captions)
    from ldm.training.reflow import reflow

    asked = {"seed": args.seed, "batch_size": args.batch_size, "device": args.device}
    asked |= arguments.settings(args)
    print(reflow(args.model, args.out, args.n, captions=captions, **asked))


def pairs(args: argparse.Namespace) -> None:
    """`ldm pairs images`."""
    config = _load(args, "diffusion")
    from ldm.training.bridges import picture_pairs

    print(picture_pairs(config, args.out, shrink=args.shrink, count=args.n, device=args.device))


def replay(args: argparse.Namespace) -> None:
    """`ldm replay`."""
    from ldm.inference.images import read_request, writable_folder

    request, model, path = read_request(Path(args.picture))
    writable_folder(Path(args.out))
    from ldm.inference.pipeline import Pipeline

    given = args.lora or (request.lora_path or "").splitlines()
    found = _checkpoint(args.model or path, model)
    pipeline = Pipeline.from_pretrained(
        found, device=args.device, options=_published(args), lora=given
    )
    if request.guide is not None:
        found = _checkpoint(args.guide or request.guide_path or "", request.guide, "--guide")
        pipeline = pipeline.guided_by(guide=Pipeline.from_pretrained(found, device=args.device))
    for saved in pipeline.draw([request]).save(args.out):
        print(saved)


def _checkpoint(path: str, identity: str, option: str = "--model") -> Path:
    """The checkpoint with that identity: at `path`, or another step of its run.

    Raises:
        LdmError: it is not there any more, or has moved.
    """
    from ldm.exchange.sources import identity as published_identity
    from ldm.exchange.sources import is_published, located
    from ldm.storage import MANIFEST, sha256

    given = Path(path)
    if path and is_published(path) and published_identity(located(path)) == identity:
        return given
    for folder in [given, *sorted(given.glob("step-*")), *sorted(given.parent.glob("step-*"))]:
        if (folder / MANIFEST).is_file() and sha256(folder / MANIFEST) == identity:
            return folder
    which = "guided" if option == "--guide" else "made"
    raise LdmError(
        f"the checkpoint that {which} the picture is not here",
        where=path,
        fix=f"give its run or step directory with {option}; run.keep_checkpoints decides how many "
        "steps a run keeps",
    )


def adherence(args: argparse.Namespace) -> None:
    """`ldm evaluate adherence`."""
    from ldm.evaluation.report import adherence_report

    print(
        adherence_report(
            args.model,
            count=args.n,
            split=args.split,
            out=Path(args.out) if args.out else None,
            device=args.device,
            cfg=args.cfg,
            steps=args.steps,
        )
    )


def likelihood(args: argparse.Namespace) -> None:
    """`ldm evaluate likelihood`."""
    from ldm.evaluation.likelihood import Settings
    from ldm.evaluation.likelihood_report import likelihood_report

    print(
        likelihood_report(
            args.model,
            Settings(args.n, args.split, args.steps, args.probes, batch_size=args.batch_size),
            out=Path(args.out) if args.out else None,
            json_file=Path(args.json) if args.json else None,
            device=args.device,
        )
    )


def verify(args: argparse.Namespace) -> None:
    """`ldm verify`."""
    from ldm.verification.suite import verify

    files = {name: getattr(args, name) for name in ("json", "plot", "methods")}
    print(verify(**{name: Path(file) if file else None for name, file in files.items()}))


def memorisation(args: argparse.Namespace) -> None:
    """`ldm evaluate memorisation`."""
    from ldm.evaluation.memorisation_report import Settings, memorisation_report

    chosen = (args.n, args.split, args.space, args.seed, args.train_limit, args.probes)
    settings = Settings(*chosen, sampling=arguments.settings(args))
    files = {"pictures": args.pictures, "out": args.out, "json_file": args.json}
    print(memorisation_report(args.model, settings, **files, device=args.device))


def vae_doctor(args: argparse.Namespace) -> None:
    """`ldm vae doctor`."""
    data = None
    if args.config is not None:
        from ldm.config.files import load

        data = load([args.config]).data
    from ldm.evaluation.codec_doctor import Settings, vae_doctor

    settings = Settings(args.n, args.px, args.features, args.lpips)
    files = {"pictures": args.pictures, "out": args.out, "json_file": args.json}
    print(vae_doctor(args.model, settings, data=data, **files, device=args.device))


def model_info(args: argparse.Namespace) -> None:
    """`ldm model info`."""
    size = None if args.size is None else _size(args.size)
    from ldm.model_info import info_text, model_info

    info = model_info(args.name, size)
    print(json.dumps(info, indent=2) if args.json else info_text(info))


def model_list(args: argparse.Namespace) -> None:
    """`ldm model list`."""
    from ldm.model_info import model_names

    print("\n".join(model_names()))


def demo(args: argparse.Namespace) -> None:
    """`ldm demo`."""
    from ldm.demo import run_demo

    run_demo(Path(args.configs), args.overrides)


def emoji(args: argparse.Namespace) -> None:
    """`ldm data emoji`."""
    from ldm.data.emoji import FONT, write_emoji

    count = write_emoji(
        Path(args.folder), image_px=args.px, font=Path(args.font) if args.font else FONT
    )
    print(f"{count} pictures in {args.folder}")


def _published(args: argparse.Namespace) -> Any:
    """What was given of the options of `arguments.published`."""
    from ldm.exchange.opening import Options

    return Options(args.prediction, args.variant, args.allow_unused, args.tokenizer)


def _load(args: argparse.Namespace, stage: str) -> Any:
    from ldm.config.files import load

    return load(args.config, args.overrides, stage=stage)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += _lines(Path(args.prompt_file))
    if not prompts:
        raise LdmError(
            "there is no prompt",
            where="--prompt",
            fix='give --prompt "a red circle" or --prompt-file FILE with one prompt a line',
        )
    return prompts


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LdmError(
            f"the file is not UTF-8 (byte {error.start})",
            where=str(path),
            fix="save it as UTF-8",
            code=ExitCode.IO,
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _size(text: str) -> tuple[int, int]:
    """SIDE or WIDTHxHEIGHT, to (height, width)."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise LdmError(f"{text!r} is not a size", where="--size", fix="use 64 or 64x128")
    width, height = (int(part) for part in (parts * 2 if len(parts) == 1 else parts))
    return height, width
