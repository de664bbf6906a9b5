"""Where a published model is: a diffusers directory, a single file, or a repository of the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ldm import storage
from ldm.checkpoint.contract import CONTRACT, MODEL_INDEX
from ldm.errors import ExitCode, LdmError
from ldm.exchange.weights import refuse_pickle, shards

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# here a star matches slashes, too: weights at the top are single files of the same model
HUB_FILES = ["*.json", "*/*.safetensors", "*merges.txt", "*vocab.txt", "*spiece.model"]
RUNS = "runs"
"""Where configurations put runs; no name of an owner on the Hub."""


def is_published(source: Path | str) -> bool:
    """Whether `source` is, or may be, somebody else's model: no run and no checkpoint of ours."""
    path = Path(source)
    if path.is_file():
        return True
    if not path.exists():
        # a mistyped run is no question for the Hub
        ours = path.parent.exists() or path.parts[0] == RUNS
        return HUB_ID.fullmatch(str(source)) is not None and not ours
    if (path / CONTRACT).is_file() or any(path.glob("step-*")):
        return False
    return (path / MODEL_INDEX).is_file()


def located(source: Path | str) -> Path:
    """The directory or file of a published model, fetched from the Hub if it is not here.

    A Hub id that is in the local cache is never looked up on the network, and the network is not
    tried where HF_HUB_OFFLINE is set.

    Raises:
        LdmError: code IO, for a pickle, or a model that is not to be had.
    """
    path = Path(source)
    if path.is_file():
        refuse_pickle(path)
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            raise LdmError(
                f"{path.name} is no safetensors file",
                where=str(path),
                fix="give a .safetensors file, an index of shards, or a diffusers directory",
                code=ExitCode.IO,
            )
        return path
    if path.is_dir():
        return path
    return _from_hub(str(source))


def identity(path: Path) -> str:
    """sha256 over the files of a published model that decide its pictures, in the order of names.

    Names count as well as contents; reading takes about a second a gigabyte.
    """
    digest = hashlib.sha256()
    if path.is_file():
        files = [path, *(shards(path) if path.suffix == ".json" else ())]
        root = path.parent
    else:
        files, root = sorted(path.rglob("*")), path
    for file in files:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if not hidden and file.suffix in (".json", ".safetensors", ".txt", ".model"):
            digest.update(f"{file.relative_to(root)}:{storage.sha256(file)}\n".encode())
    return digest.hexdigest()


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True))
        if (cached / MODEL_INDEX).is_file():
            return cached
    except (OSError, ValueError):
        pass  # not in the cache: the next call says why it cannot be fetched
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        if not offline:  # its progress bar stays: a silent download of gigabytes looks like a hang
            return Path(
                snapshot_download(
                    hub_id, allow_patterns=HUB_FILES, ignore_patterns=["*.fp16.*", "*.bf16.*"]
                )
            )
        reason = "HF_HUB_OFFLINE is set"
    except (OSError, ValueError) as error:
        reason = type(error).__name__
    raise LdmError(
        "is no run, no diffusers directory, no file and no model in the local Hugging Face cache, "
        f"and the Hub cannot give it ({reason})",
        where=hub_id,
        fix=f"check the path; for a Hub id, run `hf download {hub_id}` while online",
        code=ExitCode.IO,
    )
