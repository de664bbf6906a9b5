"""Checkpoints: what lies in a step directory, how it is saved, found and loaded strictly.

Tensors are safetensors, everything else is JSON; nothing is ever unpickled.
"""

from ldm.checkpoint.contract import (
    Contract,
    load_contract,
    load_null,
    save_contract,
    save_model_index,
    save_null,
)
from ldm.checkpoint.runs import agree, find_checkpoint, save_checkpoint
from ldm.checkpoint.state import (
    load_optimizer_state,
    load_state,
    optimizer_state,
    pack,
    save_state,
    unpack,
)
from ldm.checkpoint.tensors import (
    WEIGHTS,
    load_module,
    load_strict,
    load_tensors,
    plain_names,
    save_module,
    save_tensors,
)

__all__ = [
    "WEIGHTS",
    "Contract",
    "agree",
    "find_checkpoint",
    "load_contract",
    "load_module",
    "load_null",
    "load_optimizer_state",
    "load_state",
    "load_strict",
    "load_tensors",
    "optimizer_state",
    "pack",
    "plain_names",
    "save_checkpoint",
    "save_contract",
    "save_model_index",
    "save_module",
    "save_null",
    "save_state",
    "save_tensors",
    "unpack",
]
