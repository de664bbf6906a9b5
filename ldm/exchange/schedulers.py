"""What a diffusers scheduler says of a model, as our process, prediction and sampler, and back.

`read` understands the scheduler_config.json of a published model, `written` makes the one that
draws as our sampler does. What has no counterpart is refused by its name. Loads no torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import ExitCode, LdmError

log = logging.getLogger(__name__)

TRAIN_STEPS = 1000
LINEAR = "linear", 1e-4, 0.02
SCALED = "scaled_linear", 0.00085, 0.012
TABLES: dict[str, tuple[tuple[str, float, float], bool]] = {
    "sd": (SCALED, False),
    "sd_zero_snr": (SCALED, True),
    "vp_linear": (LINEAR, False),
    "vp_linear_0.04": (("linear", 1e-4, 0.04), False),
}
"""Process -> (beta_schedule, beta_start, beta_end), rescale_betas_zero_snr."""
FLOW = "rectified_flow"
PREDICTIONS = {
    "eps": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
}
DISCRETE_PREDICTIONS = ("eps", "v", "x0")
FLOW_PREDICTIONS = ("flow", "x0")

SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "dpmpp_2m",
    "LMSDiscreteScheduler": "dpmpp_2m",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "UniPCMultistepScheduler": "unipc",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}
"""Their class -> our sampler of the same method, or of like quality where it is a variant of its
own (PNDM's start, LMS, DEIS)."""
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
DDIM, DPM = "DDIMScheduler", "DPMSolverMultistepScheduler"
WRITTEN = {
    **dict.fromkeys(("ddim", "euler", "dpm_solver_1"), (DDIM, "ddim")),
    "dpmpp_2m": (DPM, "dpmpp_2m"),
}
"""Our sampler -> their class and the sampler that it is; the others become dpmpp_2m."""
STEPS = 20
"""Of an imported model's default, unless the class has its own usual number."""


@dataclass(frozen=True)
class Schedule:
    """What a scheduler says, in our words.

    Args:
        process, prediction: names in our tables.
        sampler, spacing, shift: defaults for sampling.
        notes: what differs from the scheduler's own grid or method, for the log.
    """

    process: str
    prediction: str
    sampler: str
    spacing: str
    shift: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A scheduler for diffusers that draws as our sampler does.

    Args:
        config: its scheduler_config.json.
        sampler: our sampler that it equals on its own grid.
        spacing: our spacing that gives its grid, or None where only its own grid does.
        notes: what differs from the run's own defaults.
    """

    config: Mapping[str, Any]
    sampler: str
    spacing: str | None
    notes: tuple[str, ...] = ()


def read(config: Mapping[str, Any], where: str, *, tokens: int | None = None) -> Schedule:
    """The process, prediction and sampling defaults that a scheduler's configuration means.

    Args:
        config: the parsed scheduler_config.json.
        where: the file, for messages.
        tokens: picture tokens of the model at its usual size, for shifts that depend on it.

    Raises:
        LdmError: code CONFIG, for a class, table or prediction that we have no name for.
    """
    kind = str(config.get("_class_name"))
    if kind not in SAMPLERS:
        raise _unknown("_class_name", kind, tuple(SAMPLERS), where)
    if (steps := config.get("num_train_timesteps", TRAIN_STEPS)) != TRAIN_STEPS:
        raise _unknown("num_train_timesteps", steps, (TRAIN_STEPS,), where)
    if kind in FLOW_CLASSES or config.get("use_flow_sigmas"):
        return _read_flow(kind, config, where, tokens)
    if config.get("trained_betas") is not None:
        raise _unknown("trained_betas", "a table of its own", (None,), where)
    found = (
        str(config.get("beta_schedule", "linear")),
        float(config.get("beta_start", LINEAR[1])),
        float(config.get("beta_end", LINEAR[2])),
    )
    zero = bool(config.get("rescale_betas_zero_snr", False))
    names = [name for name, row in TABLES.items() if row == (found, zero)]
    if not names:
        value = f"{found}, rescale_betas_zero_snr={zero}"
        raise _unknown("beta_schedule, beta_start, beta_end", value, tuple(TABLES.items()), where)
    prediction = _prediction(config.get("prediction_type", "epsilon"), DISCRETE_PREDICTIONS, where)
    spacing, notes = _spacing(kind, config)
    sampler = _sampler(kind, config)
    if zero and sampler == "euler_ancestral":
        sampler = "ddim"
    return Schedule(names[0], prediction, sampler, spacing, notes=notes)


def written(
    process: str, prediction: str, sampler: str, *, shift: float, flow_class: bool = False
) -> Written:
    """The scheduler that draws as our sampler does.

    Args:
        process, prediction, sampler: of the run.
        shift: resolution shift of the run.
        flow_class: whether the pipeline takes FlowMatchEulerDiscreteScheduler (SD3's does); those
            made for tables of betas need DPMSolverMultistepScheduler instead.

    Raises:
        LdmError: code CONFIG, for a process or prediction that no scheduler of diffusers knows.
    """
    if process == FLOW:
        return _write_flow(prediction, sampler, shift, flow_class)
    if process not in TABLES:
        known = ", ".join((*TABLES, FLOW))
        raise LdmError(
            f"process {process} has no scheduler in diffusers",
            where="process",
            fix=f"it can be exported for {known}; draw from this run with `ldm infer`",
            code=ExitCode.CONFIG,
        )
    if prediction not in DISCRETE_PREDICTIONS:
        raise _unexportable(prediction, process, DISCRETE_PREDICTIONS)
    if shift != 1.0:
        raise LdmError(
            f"diffusers has no scheduler that shifts process {process} (shift={shift:g})",
            where="sampling.shift",
            fix="train with diffusion.timesteps.shift=1, or with process rectified_flow",
            code=ExitCode.CONFIG,
        )
    (schedule, start, end), zero = TABLES[process]
    kind, ours = WRITTEN.get(sampler, (DPM, "dpmpp_2m"))
    if zero:  # only DDIM's formula survives alpha = 0; the others put 2^-24 there
        kind, ours = DDIM, "ddim"
    own = DDIM_CONFIG if kind == DDIM else DPM_CONFIG
    config = {
        "_class_name": kind,
        "num_train_timesteps": TRAIN_STEPS,
        "beta_schedule": schedule,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": PREDICTIONS[prediction],
        "rescale_betas_zero_snr": zero,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        **own,
    }
    return Written(config, ours, "trailing", _other_sampler(sampler, ours))


DDIM_CONFIG: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": True}
DPM_CONFIG: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}


def _write_flow(prediction: str, sampler: str, shift: float, flow_class: bool) -> Written:
    legal = ("flow",) if flow_class else FLOW_PREDICTIONS
    if prediction not in legal:
        raise _unexportable(prediction, FLOW, legal)
    if flow_class:
        # dynamic with equal ends: the shift acts once, where a static one moves sigma_min twice
        config = {
            "_class_name": FLOW_CLASSES[0],
            "num_train_timesteps": TRAIN_STEPS,
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "base_shift": math.log(shift),
            "max_shift": math.log(shift),
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "time_shift_type": "exponential",
        }
        return Written(config, "euler", "linear", _other_sampler(sampler, "euler"))
    ours = WRITTEN.get(sampler, (DPM, "dpmpp_2m"))[1]
    order = 1 if ours == "ddim" else 2
    config = {
        "_class_name": DPM,
        "num_train_timesteps": TRAIN_STEPS,
        "prediction_type": PREDICTIONS[prediction],
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "steps_offset": 1,  # means nothing to flows, and diffusers warns of any other
        **DPM_CONFIG,
        "solver_order": order,
    }
    notes = (
        "diffusers' scheduler for flows starts at 0.999 and tells the network whole numbers of "
        "thousandths; draws differ from `ldm infer` by that",
    )
    return Written(config, ours, None, notes + _other_sampler(sampler, ours))


def _read_flow(kind: str, config: Mapping[str, Any], where: str, tokens: int | None) -> Schedule:
    if kind in FLOW_CLASSES:
        prediction, shift = "flow", float(config.get("shift", 1.0))
    else:
        said = config.get("prediction_type", "epsilon")
        prediction = _prediction(said, FLOW_PREDICTIONS, where)
        shift = float(config.get("flow_shift", 1.0))
    for key in ("invert_sigmas", "shift_terminal", "stochastic_sampling"):
        if config.get(key):
            raise _unknown(key, config[key], (None,), where)
    notes: tuple[str, ...] = ()
    spacing = "linear" if kind in FLOW_CLASSES else "uniform"
    if kind in FLOW_CLASSES and shift != 1.0 and not config.get("use_dynamic_shifting"):
        end = shift / (TRAIN_STEPS + shift - 1)
        notes = (
            f"its grid ends at {end:.4g} before the shift, ours at 0.001: the last steps differ",
        )
    if config.get("use_dynamic_shifting"):
        if config.get("time_shift_type", "exponential") != "exponential":
            raise _unknown("time_shift_type", config["time_shift_type"], ("exponential",), where)
        # between two sizes, linear in the number of tokens: what the pipelines compute per call
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        count = many if tokens is None else tokens
        mu = low + (high - low) * (count - few) / (many - few)
        shift = math.exp(mu)
        notes = (f"the shift {shift:g} is that of {count} tokens; other sizes want another",)
    karras = "karras" if config.get("use_karras_sigmas") else None
    return Schedule(FLOW, prediction, _sampler(kind, config), karras or spacing, shift, notes)


def _sampler(kind: str, config: Mapping[str, Any]) -> str:
    name = SAMPLERS[kind]
    if name == "dpmpp_2m" and str(config.get("algorithm_type", "")).startswith("sde"):
        return "dpmpp_2m_sde"
    if kind == DPM and config.get("solver_order", 2) == 1:
        return "ddim"
    return name


def _spacing(kind: str, config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    if config.get("use_karras_sigmas"):
        return "karras", ()
    usual = "leading" if kind in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler") else "linspace"
    spacing = config.get("timestep_spacing", usual)
    if spacing == "linspace":
        return "trailing", ("the grid linspace is drawn on trailing, the nearest of ours",)
    if spacing == "leading" and config.get("steps_offset", 0) != 1:
        return "leading", ("the grid leading has the offset 1 here; the model's own has 0",)
    return str(spacing), ()


def _prediction(found: Any, legal: tuple[str, ...], where: str) -> str:
    names = {PREDICTIONS[name]: name for name in legal}
    if found not in names:
        raise _unknown("prediction_type", found, tuple(names), where)
    return names[found]


def _other_sampler(wanted: str, got: str) -> tuple[str, ...]:
    if wanted == got or (got == "ddim" and WRITTEN.get(wanted, ("", ""))[1] == "ddim"):
        return ()
    return (f"sampler {wanted} has no equal in diffusers: the scheduler draws as {got}",)


def _unexportable(prediction: str, process: str, legal: tuple[str, ...]) -> LdmError:
    return LdmError(
        f"prediction {prediction} on process {process} has no scheduler in diffusers",
        where="prediction",
        fix=f"there it can be {' or '.join(legal)}; draw from this run with `ldm infer`",
        code=ExitCode.CONFIG,
    )


def _unknown(key: str, value: object, known: tuple[Any, ...], where: str) -> LdmError:
    return LdmError(
        f"{key}={value} is not known here",
        where=where,
        fix=f"the known ones: {', '.join(map(str, known))}",
        code=ExitCode.CONFIG,
    )
