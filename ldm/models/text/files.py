"""Text encoders as files: where they lie, on disk or on the Hub, and reading them strictly.

Safetensors only; nothing is printed; a file that lacks weights is refused instead of filled up with
random ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import ExitCode, LdmError


def locate(source: Path | str, suffix: str = "") -> tuple[Path, Path]:
    """The directories of a text encoder and of its tokenizer.

    Args:
        source: a directory with `text_encoder/` and `tokenizer/`, a flat Hugging Face directory, or
            a Hub id. A Hub id that is in the local cache is never looked up on the network.
        suffix: of those two folders: `_2`, `_3` for the further encoders of one model.

    Raises:
        LdmError: IO, if there is none or the Hub cannot be reached.
    """
    root = Path(source) if Path(source).is_dir() else _from_hub(str(source), suffix)
    if (root / f"text_encoder{suffix}" / "config.json").is_file():
        return root / f"text_encoder{suffix}", root / f"tokenizer{suffix}"
    if suffix:
        raise LdmError(
            f"holds no text_encoder{suffix}/config.json, so it is no model with several encoders",
            where=str(root),
            fix="give a model of that style, or a source for each encoder",
            code=ExitCode.IO,
        )
    if not (root / "config.json").is_file():
        raise LdmError(
            "holds no text encoder: neither text_encoder/config.json nor config.json is there",
            where=str(root),
            fix="give a run, a Hugging Face text model, or what `ldm train-clip` wrote",
            code=ExitCode.IO,
        )
    if _has_tokenizer(root):
        return root, root
    # .../text_encoder_2 of a diffusers model has its tokenizer in .../tokenizer_2
    return root, root.parent / root.name.replace("text_encoder", "tokenizer")


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """The CLIP text tower or T5 encoder in `directory`, on the CPU.

    Args:
        directory: with config.json and model.safetensors (one or several shards).
        dtype: of the weights; the dtype of the file does not matter.

    Raises:
        LdmError: CONFIG for another kind of model, IO for missing or damaged files.
    """
    import transformers

    with _readable(directory):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind = KINDS.get(config["model_type"])
    if kind is None:
        raise LdmError(
            f"is a {config['model_type']!r} model, not one of {', '.join(sorted(KINDS))}",
            where=str(directory),
            fix="use a CLIP text model or a T5 encoder",
            code=ExitCode.CONFIG,
        )
    name = "T5EncoderModel" if kind == "t5" else "CLIPTextModel"
    if "CLIPTextModelWithProjection" in config.get("architectures", ()):
        name = "CLIPTextModelWithProjection"
    with quiet(), _readable(directory):
        model, report = getattr(transformers, name).from_pretrained(
            directory,
            dtype=dtype,
            variant=_variant(directory),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if report["missing_keys"]:  # transformers would go on with random weights
        raise LdmError(
            f"lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} for one",
            where=str(directory),
            fix="fetch or write it again",
            code=ExitCode.IO,
        )
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`.

    Raises:
        LdmError: IO for missing or damaged files.
    """
    from transformers import AutoTokenizer

    if not _has_tokenizer(directory):
        raise LdmError(
            f"holds no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there",
            where=str(directory),
            fix="fetch the model again with its tokenizer, or check the path",
            code=ExitCode.IO,
        )
    with quiet(), _readable(directory):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object such as config.json.

    Raises:
        LdmError: IO for a file that is missing or damaged.
    """
    with _readable(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def fill(model: Any, state: Mapping[str, Tensor], where: str) -> None:
    """Loads weights into a text model made on the meta device, strictly.

    Args:
        model: of transformers, see `published_text_model`.
        state: in the names of its state_dict, with or without `text_model.`.
        where: where they come from, for messages.

    Raises:
        LdmError: IO for weights that are missing, left over, or of another shape.
    """
    bare = {name.removeprefix("text_model."): name for name in model.state_dict()}
    given = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    given.pop("embeddings.position_ids", None)  # a counter that older files hold
    if "encoder.embed_tokens.weight" in bare and "shared.weight" in given:  # one tensor, two names
        given["encoder.embed_tokens.weight"] = given["shared.weight"]
    missing, unused = sorted(bare.keys() - given.keys()), sorted(given.keys() - bare.keys())
    shapes = {name: model.state_dict()[whole].shape for name, whole in bare.items()}
    wrong = [name for name in given if name in shapes and given[name].shape != shapes[name]]
    for what, names in (("lacks", missing), ("has no place for", unused), ("has another", wrong)):
        if names:
            raise LdmError(
                f"the text encoder {what} {names[0]} and {len(names) - 1} more weights",
                where=where,
                fix="check that file and configuration belong together",
                code=ExitCode.IO,
            )
    model.load_state_dict({bare[name]: tensor for name, tensor in given.items()}, assign=True)
    if "encoder.embed_tokens.weight" in bare:
        model.encoder.embed_tokens.weight = model.shared.weight
    for module in model.modules():
        positions = getattr(module, "position_ids", None)  # in no file
        if positions is not None:
            module.position_ids = torch.arange(positions.shape[1])[None]


@contextmanager
def quiet() -> Iterator[None]:
    """No load reports or progress bars from transformers; its settings come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _from_hub(hub_id: str, suffix: str = "") -> Path:
    """The local snapshot of a Hub repository, fetched only if it is not in the cache."""
    from huggingface_hub import snapshot_download

    weights = f"text_encoder{suffix}/model*.safetensors" if suffix else "**/model*.safetensors"
    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True))
        if any(cached.glob(weights)) and _has_tokenizer(cached, "**/"):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache, or no id at all: the next call says which
    wanted = [*HUB_FILES, *(HUB_FURTHER if suffix else ())]
    try:
        # its progress bar stays: a silent download of gigabytes looks like a hang
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=HUB_SKIP))
    except (OSError, ValueError) as error:
        raise LdmError(
            "is neither a directory nor a model in the local Hugging Face cache, and the Hub "
            f"cannot give it ({type(error).__name__})",
            where=hub_id,
            fix=f"check the path; for a Hub id, run `hf download {hub_id}` while online; or train "
            "an encoder on your own captions with `ldm train-clip`",
            code=ExitCode.IO,
        ) from error


def _variant(directory: Path) -> str | None:
    """The precision in the names of the weight files, where no file goes without one."""
    if any(directory.glob("model.safetensors*")):
        return None
    marked = sorted(directory.glob("model.*.safetensors"))
    return marked[0].suffixes[0].lstrip(".") if marked else None


def _has_tokenizer(root: Path, below: str = "") -> bool:
    return any(any(root.glob(f"{below}{name}")) for name in TOKENIZER_FILES)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turns whatever a loader raises about files into one sentence."""
    try:
        yield
    except LdmError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise a dozen types
        reason = str(error).strip().splitlines() or [""]
        raise LdmError(
            f"cannot be read as a text encoder: {type(error).__name__}: {reason[0]:.200}",
            where=str(directory),
            fix="fetch or write it again; weights must be safetensors",
            code=ExitCode.IO,
        ) from error


KINDS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}
"""`model_type` of config.json -> kind of encoder."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")

# here a star matches slashes, too
HUB_FILES = ["model*.safetensors*", "text_encoder/model*.safetensors*", "*merges.txt"]
HUB_FILES += ["*config.json", "*tokens*.json", *(f"*{name}" for name in TOKENIZER_FILES)]
HUB_FURTHER = ["text_encoder_2/model*.safetensors*", "text_encoder_3/model*.safetensors*"]
HUB_SKIP = ["*.fp16.*", "*.bf16.*"]
