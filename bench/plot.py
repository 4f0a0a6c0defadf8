"""Draws the layer's overhead (the cases `tax`) and the heads' times from a document that compare.py wrote:
`python bench/plot.py results.json overhead.png heads.png`. compare.py's --plot draws the first."""

import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PEERS = "#9aa5b8"
COLOURS = {"ours": "#d1495b", "yardstick": "#2b2d42"}
NAMES = {
    "yardstick": "one mul_, for scale",
    "pasted": "common Python layer",
    "compiled pasted": "common layer, compiled",
    "tuned": "tuned Python layer",
    "yardstick: one copy": "one copy of the features, for scale",
    "yardstick: one product": "one large product, for scale",
    "yardstick: the layers' products": "the layers' products alone",
}
HEADS = ("heads/", "heads_mse/", "heads_hidden/")


def draw(document: dict, path: Path) -> None:
    """One panel per size, one bar per eager row.

    The sizes are a factor of 10^4 apart, so each panel has its own scale; it is linear, because a cost that is lost in
    the noise lies around zero, on either side, where a logarithm has no place for it.
    """
    cases = [case for case in document["cases"] if case["name"].startswith("tax/")]
    if not cases:
        raise SystemExit("nothing to draw: no tax case was measured")
    figure = _panels(
        cases,
        document["environment"],
        "cost",
        title="What a gradient reversal layer adds to forward + backward",
        below="time over a plain view in the same chain; bar: median, line: middle half of the paired rounds\n"
        "one mul_ is called from Python by itself; grl_ext multiplies in C++, within the backward, and may take less",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_heads(document: dict, path: Path) -> None:
    """One panel per shape, one bar per eager row, with its own scale as above."""
    cases = [case for case in document["cases"] if case["name"].startswith(HEADS)]
    if not cases:
        raise SystemExit("nothing to draw: no case of heads was measured")
    figure = _panels(
        cases,
        document["environment"],
        "total",
        title="Heads and their losses: forward + backward",
        below="bar: median, line: middle half of the rounds; the shapes are features, then the sizes of the heads",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(cases: list[dict], facts: dict, measure: str, title: str, below: str) -> Figure:
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    most = max(len(_rows(case, measure)) for case in cases)
    size = (5.2 * columns, 1.0 + lines * (0.6 + 0.26 * most))
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for case, panel in itertools.zip_longest(cases, panels.flat):
        if case is None:
            panel.set_visible(False)
        else:
            _panel(panel, case, measure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    where = (
        f"{facts['device_name']}, CPU threads {facts['threads']}" if facts["device"] == "cpu" else facts["device_name"]
    )
    figure.supxlabel(
        f"{below}\n{where}, {facts['dtype']}, torch {facts['torch']}, eager, commit {facts['commit'] or 'unknown'}",
        fontsize=9,
        color="#555555",
    )
    return figure


def _rows(case: dict, measure: str) -> list[dict]:
    """The chunked form takes several times as long as all others, which would not be told apart beside it."""
    return [row for row in case["rows"] if row["section"] == "eager" and row[measure] and "chunked" not in row["name"]]


def _panel(panel: Axes, case: dict, measure: str) -> None:
    rows = _rows(case, measure)
    unit, size = ("ms", 1e-3) if max(row[measure]["median"] for row in rows) >= 1e-3 else ("µs", 1e-6)
    right = max(row[measure]["q3"] for row in rows) / size
    for place, row in enumerate(rows):
        middle, q1, q3 = (row[measure][key] / size for key in ("median", "q1", "q3"))
        panel.barh(place, middle, height=0.62, color=COLOURS.get(row["kind"], PEERS))
        panel.plot([q1, q3], [place, place], color="black", linewidth=1)
        panel.text(
            max(q3, 0.0) + 0.03 * right,
            place,
            f"{middle:.3g}" if abs(middle) < 10 else f"{middle:.0f}",
            va="center",
            fontsize=9,
        )
    panel.set_yticks(range(len(rows)), [NAMES.get(row["name"], row["name"]) for row in rows], fontsize=9)
    for label, row in zip(panel.get_yticklabels(), rows, strict=False):
        if row["kind"] == "ours":
            label.set(color=COLOURS["ours"], fontweight="bold")
    kind, shape = case["name"].split("/")
    if measure == "cost":
        title = f"{shape} elements"
    else:  # 4096x1024_10+2: the features, then the heads
        title = shape.replace("_", ", ").replace("x", " x ").replace("+", " + ") + " value" * (kind == "heads_mse")
    panel.set_title(f"{title}, {unit}", fontsize=10, loc="left")
    panel.set_xlim(right=1.2 * right)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=9)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text())
    for drawn, file in zip((draw, draw_heads), sys.argv[2:], strict=False):
        drawn(measured, Path(file))
