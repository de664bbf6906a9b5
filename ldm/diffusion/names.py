"""What the diffusion core offers, by name, and which names go together. Loads no torch.

The configuration is checked against these constants before anything heavy is imported; tests
derive them from the tables and determinants of the other files of this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from ldm.errors import ExitCode, LdmError

T = TypeVar("T")

PROCESS_NAMES = ("rectified_flow", "vp_linear", "vp_cosine", "sd", "edm")
PREDICTION_NAMES = ("eps", "x0", "v", "flow", "score", "edm")
SAMPLER_NAMES = ("ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")
STOCHASTIC_SAMPLER_NAMES = ("ddim", "dpmpp_2m_sde")
SPACING_NAMES = ("uniform", "trailing", "leading", "logsnr", "karras")
WEIGHTING_NAMES = ("none", "min_snr")
TIMESTEP_NAMES = ("uniform", "logit_normal")
GUIDANCE_NAMES = ("classifier_free",)

ADMISSIBLE: dict[str, tuple[str, ...]] = {
    "rectified_flow": ("x0", "v", "flow", "edm"),  # alpha(1) = 0: eps says nothing about x0 there
    "vp_linear": PREDICTION_NAMES,
    "vp_cosine": PREDICTION_NAMES,
    "sd": PREDICTION_NAMES,
    "edm": PREDICTION_NAMES,
}
"""For each process the predictions from which x0 can be recovered at every time."""

NEEDS_DATA_STD = "edm"
"""The process and the prediction of this name need `data_std`, their input and output scale."""


def pair_error(process: str, prediction: str, data_std: float | None) -> LdmError | None:
    """Says why a process and a prediction cannot be used together, or None when they can.

    Args:
        process: one of PROCESS_NAMES.
        prediction: one of PREDICTION_NAMES.
        data_std: standard deviation of x0, or None.
    """
    if prediction not in ADMISSIBLE[process]:
        return singular_error(process, prediction, "alpha(1)=0", ADMISSIBLE[process])
    if data_std is None and NEEDS_DATA_STD in (process, prediction):
        return missing_std_error(process, prediction)
    return None


def singular_error(process: str, prediction: str, reason: str, legal: tuple[str, ...]) -> LdmError:
    """The refusal of a pair whose determinant vanishes, for `reason`, naming the legal ones."""
    return LdmError(
        f"prediction={prediction} cannot be used with process={process}: {reason}, "
        f"so x0 cannot be recovered from {prediction} there",
        where="diffusion.prediction",
        fix="use one of " + ", ".join(legal),
        code=ExitCode.CONFIG,
    )


def missing_std_error(process: str, prediction: str) -> LdmError:
    """The refusal of a pair that has no meaning, or no usable scale, without data_std."""
    return LdmError(
        f"process={process} with prediction={prediction} needs data_std, "
        "the standard deviation of x0",
        where="diffusion.data_std",
        fix="set data_std: 1.0 (latents have unit variance)",
        code=ExitCode.CONFIG,
    )


def named(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry `name` of a table.

    Args:
        kind: what the table holds, for the message: "process", "sampler".
        table: a literal table such as PROCESSES.
        name: what the user wrote.

    Raises:
        LdmError: the name is unknown; lists the known ones and the nearest.
    """
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1)
    raise LdmError(
        f"unknown {kind} {name!r}; known: {', '.join(table)}",
        where=kind,
        fix=f"use {near[0] if near else next(iter(table))}",
    )
