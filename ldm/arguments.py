"""Options of commands that have many of them. Parsers only: what they run is in `commands.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.diffusion.names import GUIDANCE_NAMES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import SPACINGS

MODEL = "run, checkpoint, diffusers directory, Hub id or single .safetensors file"
SOLVER = ("steps", "sampler", "spacing", "eta")
"""Options that are settings of the pipeline, under the same name."""


def infer(parser: argparse.ArgumentParser) -> None:
    """`ldm infer`."""
    parser.add_argument("--model", required=True, help=MODEL)
    published(parser)
    lora(parser)
    parser.add_argument("--prompt", action="append", help="what to draw; may be repeated")
    parser.add_argument("--prompt-file", help="file with one prompt a line")
    parser.add_argument("--negative", help="what to steer away from")
    parser.add_argument(
        "--weighting",
        action="store_true",
        default=None,
        help="read (word:1.3) and [word] in the prompts as emphasis",
    )
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--spacing", help=", ".join(SPACINGS))
    parser.add_argument("--cfg", type=float, help="scale of guidance; 1 is off")
    _guidance(parser)
    parser.add_argument("--eta", type=float, help="share of the sampler's noise, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--size", help="SIDE or WIDTHxHEIGHT in pixels")
    parser.add_argument("--out", default="outputs", help="folder for the pictures")
    parser.add_argument("--grid", help="also write all pictures on one sheet to this file")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at once")
    parser.add_argument(
        "--vae-tile",
        type=int,
        metavar="PX",
        help="decode in strips PX pixels high; 0: in one piece (default: strips over a megapixel)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "sdpa", "xformers", "flex"),
        help="kernel of the network's attention (default: auto)",
    )
    parser.add_argument(
        "--cpu-kernels",
        default="auto",
        choices=("auto", "plain", "tuned"),
        help="on a CPU: plain is torch's own way, tuned is faster (default: as a probe says)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def published(parser: argparse.ArgumentParser) -> None:
    """What somebody else's model may leave open."""
    parser.add_argument("--prediction", help="of a single file of SD 2: eps, or v (768 pixels)")
    parser.add_argument("--variant", help="of a diffusers directory's weight files, such as fp16")
    parser.add_argument("--tokenizer", metavar="DIR", help="of a single file's text encoder")
    parser.add_argument(
        "--allow-unused", action="store_true", help="a single file may hold unknown tensors"
    )


def export(parser: argparse.ArgumentParser) -> None:
    """`ldm export`."""
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--to",
        required=True,
        choices=("diffusers", "single-file"),
        help="diffusers: a directory; single-file: the original layout of Stable Diffusion",
    )
    parser.add_argument("--out", required=True, help="new directory")
    parser.add_argument(
        "--verify", action="store_true", help="draw with both and compare every call; run the code"
    )
    parser.add_argument("--prompt", action="append", help="of the samples; may be repeated")
    parser.add_argument("--license", help="for the model card, such as apache-2.0")
    parser.add_argument("--title", help="of the model card (default: name of the run)")
    parser.add_argument("--push", metavar="REPO_ID", help="upload to this repository of the Hub")
    published(parser)


def convert(parser: argparse.ArgumentParser) -> None:
    """`ldm convert`."""
    parser.add_argument("source", metavar="IN", help="pickled weights: .ckpt, .bin, .pth, .pt")
    parser.add_argument("target", metavar="OUT", help="new .safetensors file")


def lora(parser: argparse.ArgumentParser) -> None:
    """Adapters to draw with."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[=STRENGTH]",
        help="merge these adapters into the model; may be repeated",
    )


def reflow(parser: argparse.ArgumentParser) -> None:
    """`ldm reflow`."""
    parser.add_argument("--model", required=True, help="run directory or checkpoint to draw with")
    parser.add_argument("--out", required=True, help="new directory for the pairs")
    parser.add_argument("-n", "--n", type=int, required=True, help="pairs to draw")
    parser.add_argument("--captions", help="file with one caption a line (default: those trained)")
    parser.add_argument("--config", help="take the captions of this experiment's data instead")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs drawn at once")
    _drawing(parser)


def translate(parser: argparse.ArgumentParser) -> None:
    """`ldm translate`."""
    parser.add_argument("pictures", nargs="+", help="source pictures")
    parser.add_argument("--model", required=True, help="run or checkpoint trained on such pairs")
    parser.add_argument("--prompt", default="", help="what to make of each of them")
    parser.add_argument("--negative", help="what to steer away from")
    parser.add_argument("--out", default="outputs", help="folder for the pictures")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at once")
    _drawing(parser)


def picture_pairs(parser: argparse.ArgumentParser) -> None:
    """`ldm pairs images`, beside the experiment."""
    parser.add_argument("--out", required=True, help="new directory for the pairs")
    parser.add_argument("-n", "--n", type=int, help="at most so many pairs")
    parser.add_argument(
        "--shrink",
        type=int,
        metavar="FACTOR",
        help="sources are the pictures made smaller (default: the column source_file_name)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What was given of the options of `_drawing`, as settings of the pipeline."""
    asked = {name: getattr(args, name) for name in SOLVER} | {"cfg_scale": args.cfg}
    return {name: value for name, value in asked.items() if value is not None}


def adherence(parser: argparse.ArgumentParser) -> None:
    """`ldm evaluate adherence`."""
    parser.add_argument("--model", required=True, help="run directory or checkpoint")
    parser.add_argument("-n", "--n", type=int, default=250, help="prompts to draw")
    parser.add_argument(
        "--split",
        default="val",
        choices=("val", "unseen"),
        help="val: captions not trained on; unseen: colour-shape pairs never seen together",
    )
    parser.add_argument("--cfg", type=float, help="guidance; default from the checkpoint")
    parser.add_argument("--steps", type=int, help="solver steps; default from the checkpoint")
    parser.add_argument("--out", help="folder for adherence-SPLIT.json and its contact sheet")
    parser.add_argument("--device", help="cpu, cuda, ...")


def likelihood(parser: argparse.ArgumentParser) -> None:
    """`ldm evaluate likelihood`."""
    parser.add_argument("--model", required=True, help="run directory or checkpoint")
    parser.add_argument("-n", "--n", type=int, default=64, help="pictures to measure")
    parser.add_argument(
        "--split",
        default="val",
        choices=("val", "train"),
        help="val: pictures kept out of training; train: pictures trained on",
    )
    parser.add_argument("--steps", type=int, default=24, help="solver steps, four calls each")
    parser.add_argument("--probes", type=int, default=1, help="probes of the divergence a picture")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures measured at once")
    parser.add_argument("--out", help="folder for likelihood.json")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def memorisation(parser: argparse.ArgumentParser) -> None:
    """`ldm evaluate memorisation`."""
    parser.add_argument("--model", required=True, help="run directory or checkpoint")
    parser.add_argument("-n", "--n", type=int, default=100, help="pictures to draw")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="judge these pictures; draw none"
    )
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "val"),
        help="train: captions trained on, where copies are likeliest; val: captions kept out",
    )
    parser.add_argument(
        "--space",
        default="latents",
        choices=("latents", "pixels"),
        help="distances of latents, or of pictures shrunk to 16 pixels",
    )
    parser.add_argument(
        "--train-limit", type=int, default=50_000, help="training pictures compared, at most"
    )
    parser.add_argument(
        "--probes", type=int, default=128, help="latents for the ideal denoiser; 0 leaves it out"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for memorisation.json and the sheet of closest pairs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    _drawing(parser)


def vae_doctor(parser: argparse.ArgumentParser) -> None:
    """`ldm vae doctor`."""
    parser.add_argument("--model", required=True, help="run, checkpoint, or directory of a VAE")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--config", metavar="YAML", help="pictures of this experiment (default: of the run)"
    )
    pictures.add_argument("--pictures", type=Path, metavar="DIR", help="pictures of a folder")
    parser.add_argument("-n", "--n", type=int, default=64, help="pictures to examine")
    parser.add_argument("--px", type=int, help="side of the pictures (default: as in training)")
    parser.add_argument(
        "--features",
        metavar="RUN",
        help="describe pictures for the Frechet distance by the vision tower of this run of "
        "train-clip (default: fixed random convolutions)",
    )
    parser.add_argument("--lpips", metavar="PATH", help="weights of LPIPS (default: torch's cache)")
    parser.add_argument("--out", type=Path, help="folder for vae-doctor.json and vae-doctor.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def model_info(parser: argparse.ArgumentParser) -> None:
    """`ldm model info`."""
    parser.add_argument(
        "name", help="published network (see `ldm model list`), experiment file, run or directory"
    )
    parser.add_argument(
        "--size", help="SIDE or WIDTHxHEIGHT: latent of a denoiser, pixels of an autoencoder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def emoji(parser: argparse.ArgumentParser) -> None:
    """`ldm data emoji`."""
    parser.add_argument("folder", help="new folder for the pictures and metadata.jsonl")
    parser.add_argument("--px", type=int, default=64, help="side of the pictures")
    parser.add_argument("--font", help="path of NotoColorEmoji.ttf")


def _guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", help=", ".join(GUIDANCE_NAMES))
    parser.add_argument("--guide", help="weaker model of the same VAE, for autoguidance")
    parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times of guidance, 0 to 1"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="dynamic thresholding: 0.995, say; 0 is off"
    )
    parser.add_argument(
        "--threshold-limit", type=float, metavar="S", help="its range, in standard deviations"
    )
    parser.add_argument("--apg-eta", type=float, help="apg: weight of the part that saturates")
    parser.add_argument("--apg-norm", type=float, help="apg: largest change; 0 is no cap")
    parser.add_argument("--apg-momentum", type=float, help="apg: between -1 and 1, usually below 0")


def _drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="solver steps")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--spacing", help=", ".join(SPACINGS))
    parser.add_argument("--eta", type=float, help="share of the sampler's noise, 0 to 1")
    parser.add_argument("--cfg", type=float, help="scale of guidance; 1 is off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU when there is one)")


def verify(parser: argparse.ArgumentParser) -> None:
    """`ldm verify`."""
    parser.add_argument("--json", help="file for the rows: method, source, expected, measured")
    parser.add_argument("--plot", help="PNG for error against evaluations of every sampler")
    parser.add_argument("--methods", help="file for the page of all methods, docs/methods.md")
