"""The command `ldm`: parses first, imports what the command needs afterwards.

User mistakes end in one or two lines and a documented exit code; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ldm import __version__, arguments, commands
from ldm.errors import ExitCode, LdmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parsed(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "transformers", "absl", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked decoders would warn
    try:
        args.run(args)
    except LdmError as error:
        if args.debug:
            raise
        kind = "stopped" if error.code == ExitCode.SIGNALLED else "error"
        print(f"ldm: {kind}: {error}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print("ldm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except OSError as error:
        if args.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"ldm: error: {where}{error.strerror or error}", file=sys.stderr)
        print("  fix: check the path and the free space there", file=sys.stderr)
        return int(ExitCode.IO)
    except Exception:  # ours to mend: everything a user can mend is an LdmError
        traceback.print_exc()
        print(
            "ldm: this is a fault of ldm itself; please report it with the text above",
            file=sys.stderr,
        )
        return int(ExitCode.BUG)
    return int(ExitCode.DONE)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; configurations and overrides may also stand behind options.

    argparse takes one run of positional arguments, and hands back those of a second one.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    late = [text for text in rest if not text.startswith("-")]
    if rest and (len(late) < len(rest) or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ldm", description="Train and run your own latent text-to-image model."
    )
    parser.add_argument("--version", action="version", version=f"ldm-toolkit {__version__}")
    top = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("train-vae", "train a KL-VAE on pictures"),
        ("train-clip", "train a small CLIP text encoder on captioned pictures"),
        ("train-diffusion", "train a denoiser in latent space"),
    ):
        _configured(_command(top, name, what, commands.train))
    _configured(_command(top, "cache", "encode a data set once, before training", commands.cache))
    config = top.add_parser("config", help="look at configurations")
    show = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    _configured(_command(show, "show", "print the resolved configuration", commands.config_show))
    arguments.infer(_command(top, "infer", "draw pictures from prompts", commands.infer))
    what = "write a model for diffusers, ComfyUI and others"
    arguments.export(_command(top, "export", what, commands.export))
    what = "read pickled weights safely and write them as safetensors"
    arguments.convert(_command(top, "convert", what, commands.convert))
    what = "make pictures from pictures, by a model trained on pairs"
    arguments.translate(_command(top, "translate", what, commands.translate))
    what = "draw pairs of noise and latents, to train a straighter model on"
    arguments.reflow(_command(top, "reflow", what, commands.reflow))
    pairs = top.add_parser("pairs", help="make pairs to train on")
    kinds = pairs.add_subparsers(dest="kind", required=True, metavar="KIND")
    of_pictures = _command(kinds, "images", "latents of source and target pictures", commands.pairs)
    _configured(of_pictures)
    arguments.picture_pairs(of_pictures)
    replay = _command(top, "replay", "draw a picture again from its metadata", commands.replay)
    replay.add_argument("picture", help="PNG that `ldm infer` wrote")
    replay.add_argument("--model", help="model directory, when it has moved")
    arguments.lora(replay)
    arguments.published(replay)
    replay.add_argument("--guide", help="directory of the weaker model, when it has moved")
    replay.add_argument("--out", default="outputs", help="folder for the picture")
    replay.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")
    evaluate = top.add_parser("evaluate", help="measure a model")
    measures = evaluate.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    what = "exact prompt adherence on shapes prompts"
    arguments.adherence(_command(measures, "adherence", what, commands.adherence))
    what = "log-likelihood of held-out captioned pictures"
    arguments.likelihood(_command(measures, "likelihood", what, commands.likelihood))
    copies = _command(
        measures, "memorisation", "copies of training pictures", commands.memorisation
    )
    arguments.memorisation(copies)
    vae = top.add_parser("vae", help="look at an autoencoder")
    checks = vae.add_subparsers(dest="check", required=True, metavar="CHECK")
    what = "examine an autoencoder on held-out pictures"
    arguments.vae_doctor(_command(checks, "doctor", what, commands.vae_doctor))
    model = top.add_parser("model", help="look at networks")
    views = model.add_subparsers(dest="action", required=True, metavar="ACTION")
    what = "parameters, operations and memory of a network"
    arguments.model_info(_command(views, "info", what, commands.model_info))
    _command(views, "list", "published networks known by name", commands.model_list)
    data = top.add_parser("data", help="make data sets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    what = "emoji with their names, as an image folder"
    arguments.emoji(_command(kinds, "emoji", what, commands.emoji))
    what = "check every formula against closed forms, in about a minute"
    arguments.verify(_command(top, "verify", what, commands.verify))
    demo = _command(top, "demo", "train everything on shapes and report", commands.demo)
    demo.add_argument("--configs", default="configs/demo", help="folder with the demo's recipes")
    demo.add_argument("overrides", nargs="*", metavar="STAGE.KEY=VALUE", help="changes to recipes")
    return parser


def _command(
    parent: Any, name: str, what: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(name, help=what, description=what)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="YAML",
        help="experiment file; of several, later ones win",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG|KEY=VALUE",
        help="an experiment file, or changes such as train.steps=100",
    )
    parser.set_defaults(run=_split_positionals(parser.get_default("run")))


def _split_positionals(
    run: Callable[[argparse.Namespace], None],
) -> Callable[[argparse.Namespace], None]:
    """Positional arguments without `=` are configuration files: `ldm config show a.yaml x=1`."""

    def command(args: argparse.Namespace) -> None:
        args.config += [text for text in args.overrides if "=" not in text]
        args.overrides = [text for text in args.overrides if "=" in text]
        if not args.config:
            raise LdmError(
                "no configuration file was given",
                where="--config",
                fix="for example --config configs/tiny/dit.yaml",
                code=ExitCode.CONFIG,
            )
        run(args)

    return command


if __name__ == "__main__":
    sys.exit(main())
