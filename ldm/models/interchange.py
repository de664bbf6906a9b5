"""Reading the `config.json` of a diffusers model without guessing what it means."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ldm.errors import ExitCode, LdmError


def accept(
    found: Mapping[str, Any],
    class_name: str,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, Any],
    harmless: Collection[str],
) -> dict[str, Any]:
    """The keys of a diffusers configuration that we build from, absent ones as diffusers has them.

    Args:
        found: the parsed `config.json`.
        class_name: the only `_class_name` accepted, when there is one.
        defaults: every key we implement, with the value diffusers takes when it is absent.
        fixed: keys that exist in diffusers, with the one value that we implement.
        harmless: keys whose value changes nothing here.

    Returns:
        Keyword arguments for our configuration; JSON lists become tuples.

    Raises:
        LdmError: another class, or a key or value that is not implemented, each by its name.
    """
    found = {key: _frozen(value) for key, value in found.items()}
    if found.get("_class_name", class_name) != class_name:
        raise LdmError(
            f"this is the configuration of a {found['_class_name']}, not of a {class_name}",
            where=f"{class_name} config",
            fix=f"point at the directory that holds the {class_name}",
            code=ExitCode.CONFIG,
        )
    public = {k: v for k, v in found.items() if not k.startswith("_") and k not in harmless}
    refused = [
        f"{key}={value!r}" + (f" (only {fixed[key]!r})" if key in fixed else "")
        for key, value in public.items()
        if key not in defaults and not (key in fixed and fixed[key] == value)
    ]
    if refused:
        raise LdmError(
            f"not implemented: {', '.join(refused)}",
            where=f"{class_name} config",
            fix="use a checkpoint of the standard layout, or run this one with diffusers",
            code=ExitCode.CONFIG,
        )
    return {key: public.get(key, default) for key, default in defaults.items()}


def jsonable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields with tuples as lists, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
