"""Reads an experiment from YAML files and `key=value` overrides, and reports all mistakes at once.

Every message names the key, the file and line it came from, the rule, and a legal value.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from ldm.config.former import translated
from ldm.config.rules import conflicts
from ldm.config.schema import STAGES, Experiment
from ldm.errors import ExitCode, LdmError

COMMAND_LINE = "command line"
NO_SECTION = ("model_type", "model_attributes_type", "union_tag_not_found")
"""pydantic's words for a plain value where a section belongs."""


@dataclass
class Settings:
    """Raw values and where each dotted key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """File and line of `key`, of a key inside it, or of the nearest section around it."""
        inside = [place for name, place in self.places.items() if name.startswith(f"{key}.")]
        if key not in self.places and inside:
            return inside[-1]
        parts = key.split(".")
        while parts:
            if (found := self.places.get(".".join(parts))) is not None:
                return found
            parts.pop()
        return next(iter(self.places.values()), "configuration")


def load(paths: Sequence[str], overrides: Sequence[str] = (), *, stage: str | None = None) -> Any:
    """The experiment that `paths` (later ones win) and `key=value` overrides describe.

    Args:
        paths: YAML files.
        overrides: dotted assignments such as `train.steps=10`; values are YAML.
        stage: the stage the calling script trains; another one is an error.

    Raises:
        LdmError: code CONFIG, with every mistake found, one or two lines each.
    """
    settings = Settings()
    for path in paths:
        _read_yaml(Path(path), settings)
    for text in overrides:
        _override(text, settings)
    name = settings.values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise _failure(
            [f"{settings.place('stage')}: stage: got {name!r}; must be one of {', '.join(STAGES)}"]
        )
    if stage is not None and name != stage:
        raise LdmError(
            f"this file describes stage {name!r}, but the command trains {stage!r}",
            where=settings.place("stage"),
            fix={
                "vae": "run train_vae.py with it",
                "clip": "run `ldm train-clip` with it",
                "diffusion": "run train_diffusion.py with it",
            }[name],
            code=ExitCode.CONFIG,
        )
    return _validate(STAGES[name], settings)


def dump(config: Experiment) -> str:
    """The resolved configuration as YAML; loading it again gives an equal experiment."""
    values = config.model_dump(mode="json")
    ordered = {"stage": values.pop("stage"), **values}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=100)


MAY_CHANGE = (
    "run.",
    "preview.",
    "cache.",
    "sample.",
    "data.workers",
    "data.max_bad_fraction",
    "train.steps",
    "train.compile",
    "train.precision",
    "train.attention",
    "train.cpu_kernels",
    "train.accumulation",
    "train.gradient_checkpointing",
    "train.max_bad_steps",
    "optim.learning_rate",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.final_fraction",
    "optim.clip_norm",
    "gan.optim.learning_rate",
    "gan.optim.warmup_steps",
    "gan.optim.schedule",
    "gan.optim.final_fraction",
    "gan.optim.clip_norm",
    "loss.perceptual_path",
)
"""Keys that a resumed run may change; everything else would make it another experiment."""


def refuse_another_experiment(
    path: Path, config: Experiment, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Compares a run's stored configuration with the one given now.

    Args:
        path: the stored configuration.
        config: the one given now.
        may_change: keys, or beginnings of keys, that may differ.

    Raises:
        LdmError: code CONFIG with every difference that a resume must not have, or with the
            mistakes of a stored configuration that can no longer be read.
    """
    # read like any other, so that keys added since have their defaults: that is what the run did
    then, now = (flat(yaml.safe_load(dump(which))) for which in (load([str(path)]), config))
    changed = [
        f"{key}: {then.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(may_change)
    ]
    if changed:
        raise LdmError(
            "the run was started with another configuration: " + "; ".join(changed),
            where=str(path),
            fix="use another run.dir, or the former values",
            code=ExitCode.CONFIG,
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping: {"a": {"b": 1}} is {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def _failure(lines: Sequence[str]) -> LdmError:
    head = (
        "the configuration has a mistake"
        if len(lines) == 1
        else (f"the configuration has {len(lines)} mistakes")
    )
    return LdmError(f"{head}\n" + "\n".join(f"  {x}" for x in lines), code=ExitCode.CONFIG)


def _read_yaml(path: Path, settings: Settings) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
        raise LdmError(
            "no such configuration file", where=str(path), fix=fix, code=ExitCode.CONFIG
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LdmError(
            f"the configuration cannot be read ({error})",
            where=str(path),
            fix="give a UTF-8 text file",
            code=ExitCode.CONFIG,
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise LdmError(
            f"not valid YAML: {getattr(error, 'problem', None) or 'cannot be parsed'}",
            where=f"{path}{line}",
            fix="check indentation and colons on that line",
            code=ExitCode.CONFIG,
        ) from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise LdmError(
            "the file holds no `key: value` pairs",
            where=str(path),
            fix="start from a file in configs/",
            code=ExitCode.CONFIG,
        )
    for key, place in _places(node, str(path), ""):
        settings.places[key] = place
    _merge(settings.values, values)


def _places(node: yaml.MappingNode, path: str, prefix: str) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise LdmError(
                f"{key} is given twice (first on line {seen[key]})",
                where=f"{path}:{line}",
                fix="keep one of them",
                code=ExitCode.CONFIG,
            )
        seen[key] = line
        yield key, f"{path}:{line}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _places(value_node, path, f"{key}.")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _override(text: str, settings: Settings) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise LdmError(
            f"{text!r} is not an override",
            where=COMMAND_LINE,
            fix="write key=value, for example train.steps=100",
            code=ExitCode.CONFIG,
        )
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        parsed = value
    *sections, last = key.strip().split(".")
    nested: dict[str, Any] = {last: parsed}
    for section in reversed(sections):
        nested = {section: nested}
    _merge(settings.values, nested)
    settings.places[key.strip()] = COMMAND_LINE


def _validate(kind: type[Experiment], settings: Settings) -> Experiment:
    """Field errors and rule errors together: rules run on what is left after bad fields go."""
    problems: list[str] = []
    values = translated(settings.values)
    config: Experiment | None = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            location = _location(kind, detail["loc"])
            problems.append(_describe(kind, detail, location, settings))
            values = _without(values, location)
        values.setdefault("run", {}).setdefault("dir", "unset")
        try:
            config = kind.model_validate(values)
        except ValidationError:
            config = None  # the remaining errors follow from the ones already reported
        if any(detail["type"] in NO_SECTION for detail in error.errors(include_url=False)):
            config = None  # rules would judge defaults that nobody wrote
    if config is not None:
        for key, what, fix in conflicts(config):
            problems.append(f"{settings.place(key)}: {key}: {what}; fix: {fix}")
    if problems or config is None:
        raise _failure(problems)
    return config


def _location(kind: type[BaseModel], found: tuple[int | str, ...]) -> list[int | str]:
    """The keys of a place that pydantic names, without the tag of a choice or the kind of value."""
    parts: list[int | str] = []
    models: list[type[BaseModel]] = [kind]
    tags: set[str] = set()
    for part in found:
        infos = [m.model_fields[part] for m in models if part in m.model_fields]
        if part not in tags and (models or isinstance(part, int)):
            parts.append(part)
            models = [section for info in infos for section in _sections(info)]
        tags = {t.tag for info in infos for a in _choices(info) for t in get_args(a)[1:]}
    return parts


def _without(values: dict[str, Any], parts: Sequence[int | str]) -> dict[str, Any]:
    """A copy of `values` that lacks the field at these keys."""
    copy = {k: (dict(v) if isinstance(v, dict) else v) for k, v in values.items()}
    inner: Any = copy
    for part in parts[:-1]:
        if not isinstance(inner, dict) or not isinstance(inner.get(part), dict):
            break
        inner[part] = dict(inner[part])
        inner = inner[part]
    else:
        if isinstance(inner, dict):
            inner.pop(parts[-1], None)
        return copy
    inner.pop(part, None) if isinstance(inner, dict) else None
    return copy


def _describe(
    kind: type[Experiment], detail: Any, location: Sequence[int | str], settings: Settings
) -> str:
    key = ".".join(str(part) for part in location)
    place, rule, got = settings.place(key), str(detail["msg"]), detail.get("input")
    if detail["type"] == "extra_forbidden":
        known = list(_keys(kind))
        if key in known:
            choice = f"{key.rpartition('.')[0]}.kind"
            return f"{place}: unknown key {key}; it belongs to another {choice}"
        near = difflib.get_close_matches(key, known, 1, cutoff=0.5) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], 1
        )
        hint = f"; did you mean {_full(near[0], known)}?" if near else ""
        return f"{place}: unknown key {key}{hint}"
    if detail["type"] in NO_SECTION:
        return f"{place}: {key}: got {got!r}; must be a section: write {key}.NAME=VALUE"
    if detail["type"] == "union_tag_invalid":
        legal = detail["ctx"]["expected_tags"]
        return f"{place}: {key}.kind: got {detail['ctx']['tag']!r}; must be one of {legal}"
    if detail["type"] == "missing":
        if isinstance(location[-1], int):
            key, default = key.rpartition(".")[0], _default(kind, location[:-1])
            return f"{place}: {key}: too few values; a legal value is {list(default)}"
        return f"{place}: {key} is missing; fix: add it, for example run.dir=runs/mine"
    if detail["type"] in ("too_short", "string_too_short"):
        rule = "given, not empty"
    rule = rule.removeprefix("Value error, ").removeprefix("Input should be ")
    default = _default(kind, location)
    shown = repr(default) if default is not None else "null" * _may_be_null(kind, location)
    legal = f"; a legal value is {shown}" if shown else ""
    return f"{place}: {key}: got {got!r}; must be {rule.removeprefix('must be ')}{legal}"


def _full(name: str, known: Sequence[str]) -> str:
    return next((k for k in known if k == name or k.endswith("." + name)), name)


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    found = [info.annotation, *get_args(info.annotation), *(get_args(a)[0] for a in _choices(info))]
    return [t for t in found if isinstance(t, type) and issubclass(t, BaseModel)]


def _choices(info: FieldInfo) -> list[Any]:
    """The tagged alternatives of a field: each Annotated[section, Tag(name)]."""
    found = get_args(info.annotation)
    return [a for a in found if any(isinstance(part, Tag) for part in get_args(a)[1:])]


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in kind.model_fields.items():
        yield prefix + name
        for section in _sections(info):
            yield from _keys(section, f"{prefix}{name}.")


def _default(kind: type[BaseModel], location: Sequence[Any]) -> Any:
    infos = _fields(kind, location)
    if not infos or infos[0].is_required() or isinstance(infos[0].default, BaseModel):
        return None
    return infos[0].default


def _may_be_null(kind: type[BaseModel], location: Sequence[Any]) -> bool:
    return any(NoneType in get_args(info.annotation) for info in _fields(kind, location))


def _fields(kind: type[BaseModel], location: Sequence[Any]) -> list[FieldInfo]:
    models: list[type[BaseModel]] = [kind]
    infos: list[FieldInfo] = []
    for part in location:
        infos = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [section for info in infos for section in _sections(info)]
    return infos
