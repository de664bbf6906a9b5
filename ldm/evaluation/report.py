"""`ldm evaluate adherence`: draws, measures, and writes the report a person can check by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm import storage
from ldm.evaluation.adherence import Adherence, contact_sheet, evaluate
from ldm.inference.images import writable_folder
from ldm.inference.pipeline import Pipeline

ATTRIBUTES = ("background", "count", "colour", "relation", "size", "shape", "all")


def measure(
    pipeline: Pipeline, *, count: int, split: str, seed: int = 0, **settings: Any
) -> Adherence:
    """Adherence of a model's pictures to `count` captions of a split of the shapes data."""
    from tqdm.auto import tqdm

    drawn = 0
    with tqdm(total=count, unit="image", desc=f"adherence {split}", disable=None) as bar:

        def draw(captions: list[str]) -> Any:
            nonlocal drawn
            before = drawn
            pictures = pipeline(
                captions,
                seed=seed + before,
                batch_size=32,
                progress=lambda done: bar.update(before + done - bar.n),
                **settings,
            )
            drawn += len(captions)
            return pictures.images

        return evaluate(draw, split, count, seed=seed)


def adherence_report(
    model: str,
    *,
    count: int,
    split: str,
    out: Path | None,
    device: str | None = None,
    cfg: float | None = None,
    steps: int | None = None,
) -> str:
    """Measures a model and returns the table as text.

    Args:
        model: run directory or checkpoint.
        count: captions to draw.
        split: "val" or "unseen".
        out: folder for `adherence-<split>.json` and `adherence-<split>.png`; None writes neither.
        device: where to draw.
        cfg, steps: sampling settings other than those of the checkpoint.
    """
    if out is not None:
        writable_folder(out)  # before drawing for minutes
    pipeline = Pipeline.from_pretrained(model, device=device)
    asked = {"cfg_scale": cfg, "steps": steps}
    settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    result = measure(pipeline, count=count, split=split, **settings)
    if out is not None:
        facts = {"model": model, "split": split, **settings, **as_json(result)}
        storage.write_json(out / f"adherence-{split}.json", facts)
        save_sheet(result, out / f"adherence-{split}.png")
    return table(result)


def as_json(result: Adherence) -> dict[str, Any]:
    """The figures of a result: headline (one and two objects) and by number of objects."""
    return {
        "adherence": result.headline,
        "by_objects": {str(count): row for count, row in result.by_objects.items()},
    }


def save_sheet(result: Adherence, path: Path, count: int = 48) -> None:
    """The first pictures with their captions and what is wrong with each, as PNG."""
    sheet = contact_sheet(result.images[:count], result.captions[:count], result.verdicts[:count])
    storage.write_file(path, lambda file: sheet.save(file, format="PNG"))


def table(result: Adherence) -> str:
    """The figures as text, in percent with 95 % intervals."""
    columns = {"1 and 2 objects": result.headline} | {
        f"{count} object{'s' if count > 1 else ''}": row
        for count, row in sorted(result.by_objects.items())
    }
    lines = ["".join([f"{'':12}", *(f"{name:>22}" for name in columns)])]
    for attribute in ATTRIBUTES:
        cells = [_cell(row.get(attribute)) for row in columns.values()]
        lines.append("".join([f"{attribute:12}", *(f"{cell:>22}" for cell in cells)]))
    counts = "".join(f"{row['n']:>22}" for row in columns.values())
    return "\n".join([*lines, f"{'pictures':12}{counts}"])


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:6.1%} ({value['low']:.0%}..{value['high']:.0%})"
