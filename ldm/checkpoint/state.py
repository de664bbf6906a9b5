"""The state a run resumes from: a closed list of tensors and JSON facts, restored bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm import storage
from ldm.checkpoint.tensors import load_tensors, save_tensors
from ldm.errors import ExitCode, LdmError

TENSORS = "tensors.safetensors"
FACTS = "facts.json"


def save_state(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes the resume state; the directory is made if missing.

    Args:
        directory: e.g. `<checkpoint>/state`.
        tensors: named `<item>/<rest>`, see `pack`.
        facts: one JSON value per item; an item may have tensors, a fact, or both.

    Raises:
        LdmError: code IO.
    """
    storage.make_directory(directory)
    storage.write_json(Path(directory) / FACTS, {"facts": dict(facts), "tensors": sorted(tensors)})
    save_tensors(Path(directory) / TENSORS, tensors)


def load_state(directory: Path, items: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of `save_state`.

    Args:
        directory: as saved.
        items: the items the run consists of; the list is closed, so that nothing is lost silently.

    Raises:
        LdmError: code IO, if an item is missing or unknown, or a file is damaged.
    """
    directory = Path(directory)
    listing = storage.read_json(directory / FACTS)
    tensors = load_tensors(directory / TENSORS, finite=False)
    whole = isinstance(listing, dict) and listing.keys() == {"facts", "tensors"}
    if not whole or sorted(tensors) != listing["tensors"]:
        raise _unfit(directory, f"{TENSORS} and {FACTS} are not of the same save")
    found = {name.partition("/")[0] for name in tensors} | listing["facts"].keys()
    missing, unknown = sorted(set(items) - found), sorted(found - set(items))
    if missing or unknown:
        raise _unfit(
            directory,
            f"the state does not fit this run: missing {missing or 'nothing'}, "
            f"unknown {unknown or 'nothing'}",
        )
    return tensors, listing["facts"]


def pack(item: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the tensors `<item>/<name>`, for `save_state`."""
    return {f"{item}/{name}": value for name, value in tensors.items()}


def unpack(item: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one item, under their own names."""
    prefix = f"{item}/"
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def optimizer_state(
    optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name instead of by position.

    Args:
        optimizer: e.g. AdamW with exp_avg, exp_avg_sq and step per parameter.
        named: `model.named_parameters()`; every parameter of the optimizer must be among them.

    Returns:
        Tensors named `<slot>/<parameter>`, which share memory with the optimizer, and JSON facts:
        groups, slots and plain values.
    """
    names = {id(parameter): name for name, parameter in named}
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"groups": [], "slots": {}, "values": {}}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        members = [names[id(parameter)] for parameter in group["params"]]
        facts["groups"].append({"names": members, "options": options})
        for name, parameter in zip(members, group["params"], strict=True):
            slots = optimizer.state.get(parameter, {})
            stored = [slot for slot, value in slots.items() if isinstance(value, Tensor)]
            tensors |= {f"{slot}/{name}": slots[slot] for slot in stored}
            facts["slots"][name] = stored
            facts["values"][name] = {s: v for s, v in slots.items() if s not in stored}
    return tensors, facts


def load_optimizer_state(
    optimizer: Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Restores `optimizer_state` exactly: values, types and options, on the parameters' devices.

    `Optimizer.load_state_dict` is not used because it casts the moments to the parameter's type.
    How steps are executed (fused, foreach ...) stays as `optimizer` was built.

    Raises:
        LdmError: code IO, if the parameters, their grouping or the tensors differ.
    """
    names = {id(parameter): name for name, parameter in named}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if groups != [group["names"] for group in facts["groups"]]:
        raise _unfit("optimizer", "the saved optimizer has other parameters or other groups")
    expected = {f"{slot}/{name}" for name, slots in facts["slots"].items() for slot in slots}
    if differing := sorted(expected ^ tensors.keys()):
        raise _unfit("optimizer", f"missing or unknown state: {', '.join(differing[:5])}")
    for group, saved in zip(optimizer.param_groups, facts["groups"], strict=True):
        if unknown := sorted(saved["options"].keys() - group.keys()):
            raise _unfit("optimizer", f"this optimizer has no option {unknown[0]!r}")
        for key, value in saved["options"].items():
            if key not in _EXECUTION:
                group[key] = tuple(value) if isinstance(value, list) else value
        for name, parameter in zip(saved["names"], group["params"], strict=True):
            state: dict[str, Any] = dict(facts["values"][name])
            for slot in facts["slots"][name]:
                # A step counter lives on the CPU unless the kernel itself advances it.
                on_cpu = slot == "step" and not (group.get("fused") or group.get("capturable"))
                device = torch.device("cpu") if on_cpu else parameter.device
                value = tensors[f"{slot}/{name}"].to(device, copy=True)
                if value.shape == parameter.shape:
                    # Fused kernels walk memory in order: moments must lie as the parameter does,
                    # which safetensors does not keep (channels_last).
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                state[slot] = value
            optimizer.state[parameter] = state


def _unfit(where: Path | str, what: str) -> LdmError:
    return LdmError(
        what,
        where=str(where),
        fix="resume with the configuration and the program version that wrote it, or start a new "
        "run in another run.dir",
        code=ExitCode.IO,
    )


_EXECUTION = frozenset({"foreach", "fused", "capturable", "differentiable"})
