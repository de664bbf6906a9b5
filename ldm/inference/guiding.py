"""From the guidance settings of a request to the `denoise` of a batch, with what may not be asked.

A rule may need a second model: a weaker pipeline (`guide`), or a function (`log_prob`). Metadata
hold the identity of the first and the name of the second, so a replay needs the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ldm.diffusion.guidance import GUIDANCE, Finish, LogProb, Model
from ldm.errors import LdmError, named
from ldm.inference.images import Request
from ldm.types import Denoise, Level, TextEmbedding

if TYPE_CHECKING:
    from ldm.inference.pipeline import Pipeline

USES_NULL = ("classifier_free", "perp_neg", "apg")
"""The rules that compare the prompt with the empty or a negative one."""


def guided_denoise(
    pipeline: Pipeline,
    requests: Sequence[Request],
    plan: Iterable[Level] = (),
    *,
    with_variance: bool = False,
) -> Denoise:
    """What the sampler sees, for requests with equal settings; it serves one run.

    Args:
        pipeline: the model, and the guide or classifier with it.
        requests: one per picture.
        plan: the levels of the run, for what can be computed ahead.
        with_variance: return the variance that the model learned as well: 2C channels, guided x0
            and the prompt's own v.
    """
    first = requests[0]
    prompts = [request.prompt for request in requests]
    weighting = first.weighting
    negative = first.negative if first.guidance in USES_NULL else None
    options: dict[str, Any] = {}
    if first.guidance == "perp_neg":
        steered = _embedded(pipeline, [negative], weighting) if negative else None
        options["negative"] = (
            None if steered is None else with_size(steered, first.height, first.width)
        )
        negative = None  # it does not take the place of the empty prompt
    elif first.guidance == "apg":
        options["eta"], options["momentum"] = first.apg_eta, first.apg_momentum
        options["norm"] = first.apg_norm or math.inf
    elif first.guidance == "autoguidance":
        assert pipeline.guide is not None, "checked with the request"
        options["weak"] = _sized(_model(pipeline.guide, prompts, None, weighting), first)
    elif first.guidance == "classifier":
        options["log_prob"] = pipeline.log_prob
    model = _sized(replace(_model(pipeline, prompts, negative, weighting), levels=plan), first)
    if with_variance:
        model = replace(model, ask=pipeline.diffusion.denoise_with_variance)
    rule = GUIDANCE[first.guidance]
    return rule(model, first.cfg_scale, finish=finish_of(first), **options)


def finish_of(request: Request) -> Finish:
    """When guidance acts and what follows, as a request has it. LdmError when out of range."""
    limit = request.threshold_limit
    if not 0 < limit < math.inf:
        raise LdmError(
            f"threshold_limit={limit} is out of range",
            where="threshold_limit",
            fix="use a number > 0",
        )
    return Finish(request.interval, request.rescale, request.threshold, limit)


def _model(
    pipeline: Pipeline, prompts: Sequence[str], negative: str | None, weighting: bool
) -> Model:
    null = pipeline.null if negative is None else _embedded(pipeline, [negative], weighting)
    text = _embedded(pipeline, prompts, weighting)
    return Model(pipeline.diffusion, pipeline.network, text, null)


def _sized(model: Model, request: Request) -> Model:
    """The model told what SDXL is told of sizes: a whole picture of the size that is drawn."""
    size = request.height, request.width
    text, null = (with_size(part, *size) for part in (model.text, model.null))
    return replace(model, text=text, null=null)


def with_size(text: TextEmbedding, height: int, width: int) -> TextEmbedding:
    """The embedding with what SDXL is told of a whole picture of this size in pixels."""
    size = [height, width]
    row = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=text.tokens.device)
    return replace(text, sizes=row.expand(len(text), -1))


def _embedded(pipeline: Pipeline, prompts: Sequence[str], weighting: bool) -> Any:
    return pipeline.encoder(list(prompts), weighting=weighting).to(pipeline.device)


def own_rule(pipeline: Pipeline) -> dict[str, str]:
    """The setting that a guide or a log_prob means when no rule is named; empty without either.

    Raises:
        LdmError: both are there.
    """
    own = {"autoguidance": pipeline.guide, "classifier": pipeline.log_prob}
    meant = [rule for rule, given in own.items() if given is not None]
    if len(meant) > 1:
        raise LdmError(
            "there are a guide and a log_prob, and one rule at a time guides",
            where="guidance",
            fix=f"use guidance {' or '.join(meant)}",
        )
    return {"guidance": meant[0]} if meant else {}


def refuse_unused(rule: str | None, **given: bool) -> None:
    """Refuses a named rule that has no use for a second model given with it.

    Args:
        rule: what was asked for; None leaves the choice.
        given: whether there is one: guide=True, log_prob=False.

    Raises:
        LdmError: names the rule that has.
    """
    users = {"guide": "autoguidance", "log_prob": "classifier"}
    for what, there in given.items():
        if there and rule not in (None, users[what]):
            raise LdmError(
                f"guidance {rule} has no use for a {what}",
                where=what,
                fix=f"leave it out, or use guidance {users[what]}",
            )


def recorded(pipeline: Pipeline, rule: str) -> dict[str, str | None]:
    """What a request keeps of the second model that its rule needs."""
    if rule == "autoguidance" and pipeline.guide is not None:
        return {"guide": pipeline.guide.identity, "guide_path": pipeline.guide.name}
    if rule == "classifier" and pipeline.log_prob is not None:
        return {"classifier": name_of(pipeline.log_prob)}
    return {}


def name_of(log_prob: LogProb) -> str:
    """What metadata call a function, or an object that is called."""
    named_one = log_prob if hasattr(log_prob, "__qualname__") else type(log_prob)
    return f"{named_one.__module__}.{named_one.__qualname__}"


def check_guidance(pipeline: Pipeline, request: Request) -> None:
    """Refuses guidance that the request, the model or what is at hand does not allow.

    Raises:
        LdmError: names the setting, its value, and a legal one.
    """
    named("guidance", GUIDANCE, request.guidance)
    finish_of(request)
    if not math.isfinite(request.cfg_scale) or not 0 <= request.cfg_scale <= 100:
        raise LdmError(
            f"cfg_scale={request.cfg_scale} is out of range", where="cfg_scale", fix="use 0 to 100"
        )
    for name, value, legal, range_ in (
        ("apg_eta", request.apg_eta, 0 <= request.apg_eta <= 1, "0 to 1"),
        ("apg_norm", request.apg_norm, 0 <= request.apg_norm < math.inf, "0 (no cap) or more"),
        ("apg_momentum", request.apg_momentum, abs(request.apg_momentum) < 1, "above -1, below 1"),
    ):
        if not legal:
            raise LdmError(f"{name}={value} is out of range", where=name, fix=f"use {range_}")
    if request.guidance in USES_NULL:
        unguided = request.cfg_scale == 1 and not (
            request.guidance == "perp_neg" and request.negative
        )
        if pipeline.contract.caption_dropout == 0 and not unguided:
            raise LdmError(
                "this model was trained without caption dropout, so it cannot be guided",
                where="cfg_scale",
                fix="use 1",
            )
    elif request.negative:
        raise LdmError(
            f"guidance {request.guidance} has no place for a negative prompt",
            where="negative",
            fix=f"leave it out, or use guidance {', '.join(USES_NULL)}",
        )
    if request.guidance == "autoguidance":
        _check_guide(pipeline, request)
    if request.guidance == "classifier":
        _check_classifier(pipeline, request)


def _check_guide(pipeline: Pipeline, request: Request) -> None:
    guide = pipeline.guide
    drawn_by = f" (the picture had {request.guide_path})" if request.guide_path else ""
    if guide is None:
        raise LdmError(
            f"guidance autoguidance needs a weaker model{drawn_by}",
            where="guide",
            fix="give --guide RUN, or in Python guide=Pipeline.from_pretrained(RUN)",
        )
    if request.guide != guide.identity:
        raise LdmError(
            f"the request names another guide than {guide.name or 'the one'} at hand{drawn_by}",
            where="guide",
            fix="give the guide that the request was made with",
        )
    check_latents(pipeline, guide)
    for side in (request.height, request.width):
        if side % guide.stride:
            raise LdmError(
                f"the guide cannot take a side of {side} pixels: its sides are multiples of "
                f"{guide.stride}",
                where="size",
                fix=f"use a multiple of {math.lcm(pipeline.stride, guide.stride)}",
            )


def check_latents(pipeline: Pipeline, guide: Pipeline) -> None:
    """Refuses a guide that would not understand the latents of the main model.

    Raises:
        LdmError: says what differs.
    """
    ours, theirs = pipeline.contract, guide.contract
    differing = None
    for what in ("latent_channels", "downsample_factor", "latent_mean", "latent_std", "source"):
        if differing is None and getattr(ours, what) != getattr(theirs, what):
            differing = f"{what} {getattr(theirs, what)}, not {getattr(ours, what)}"
    if differing is None and pipeline.fitting_guide is not guide:
        if _same_weights(pipeline.vae, guide.vae):
            pipeline.fitting_guide = guide  # every request asks, the weights are read once
        else:
            differing = "other weights in its VAE"
    if differing is not None:
        raise LdmError(
            f"the guide{f' {guide.name}' if guide.name else ''} speaks of other latents: it has "
            f"{differing}",
            where="guide",
            fix="use a guide that was trained on the latents of the same VAE (vae.path)",
        )
    if guide.device != pipeline.device:
        raise LdmError(
            f"the guide is on {guide.device}, the model on {pipeline.device}",
            where="guide",
            fix=f"move it: guide.to({str(pipeline.device)!r})",
        )


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    if one is other:
        return True
    first, second = one.state_dict(), other.state_dict()
    if first.keys() != second.keys():
        return False
    for key, a in first.items():
        b = second[key].to(a.device)
        kind = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)  # one may be stored in half
        if a.shape != b.shape or not torch.equal(a.to(kind), b.to(kind)):
            return False
    return True


def _check_classifier(pipeline: Pipeline, request: Request) -> None:
    if pipeline.log_prob is None:
        drawn_by = f" (the picture had {request.classifier})" if request.classifier else ""
        raise LdmError(
            f"guidance classifier needs a function log_prob{drawn_by}, which no file holds",
            where="log_prob",
            fix="draw in Python: pipeline(prompt, log_prob=FUNCTION), or "
            "pipeline.guided_by(log_prob=FUNCTION).draw([request])",
        )
    if request.classifier != (name := name_of(pipeline.log_prob)):
        raise LdmError(
            f"the request names the classifier {request.classifier}, not {name}",
            where="log_prob",
            fix="give the function that the request was made with",
        )
