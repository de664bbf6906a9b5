"""The table and the plot of docs/benchmarks.md, from the rows of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def line(row: dict[str, Any]) -> str:
    """One row as a line of the table."""
    low_high = "" if row["iqr"] is None else f"{row['iqr'][0]:.2f}-{row['iqr'][1]:.2f}"
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    cells = [
        row["name"],
        row["shape"],
        row["peer"],
        _ms(row["ours_ms"]),
        _ms(row["peer_ms"]),
        f"**{row['ratio']:.2f}**",
        low_high,
        goal,
        row["note"],
    ]
    return f"| {' | '.join(cells)} |"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


HEAD = """| row | shape | against | ours, ms | theirs, ms | ratio | quartiles | goal | note |
|---|---|---|---:|---:|---:|---:|---:|---|"""


def table(document: dict[str, Any]) -> str:
    """The whole table with its circumstances."""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    head = f"{document['hardware']}; {versions}; commit {document['commit']}, {document['date']}."
    return "\n".join([head, "", HEAD, *(line(row) for row in document["rows"])])


def write(document: dict[str, Any], docs: Path) -> None:
    """Puts table and plot into the page; the text around the table stays."""
    path = docs / "benchmarks.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(document)}\n{END}{after}")
    plot(document, docs / "images" / "benchmarks.png")


def plot(document: dict[str, Any], path: Path) -> None:
    """Ratios as bars on a logarithmic axis, goals as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    rows = document["rows"][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.19 * len(rows) + 1))
    met = ["#2a7f62" if r["goal"] is None or r["ratio"] >= r["goal"] else "#b5483a" for r in rows]
    names = [row["name"] for row in rows]
    axes.barh(range(len(rows)), [row["ratio"] - 1 for row in rows], left=1, color=met, height=0.7)
    goals = [(i, row["goal"]) for i, row in enumerate(rows) if row["goal"] is not None]
    axes.plot([goal for _, goal in goals], [i for i, _ in goals], "k|", label="goal")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.set_ylim(-1, len(rows))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as the peer, or limit over measured")
    axes.legend(loc="lower right", fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)
    # a few flat colours: a fifth of the size
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)
