"""Draws the layer's overhead (the cases `tax`) from a document that compare.py wrote:
`python bench/plot.py results.json overhead.png`, or compare.py's --plot."""

import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PEERS = "#9aa5b8"
COLOURS = {"ours": "#d1495b", "yardstick": "#2b2d42"}
NAMES = {"yardstick": "yardstick: one mul_"}


def draw(document: dict, path: Path) -> None:
    """One panel per size, one bar per eager row.

    The sizes are a factor of 10^4 apart, so each panel has its own scale; it is linear, because a cost that is lost in
    the noise lies around zero, on either side, where a logarithm has no place for it.
    """
    cases = [case for case in document["cases"] if case["name"].startswith("tax/")]
    if not cases:
        raise SystemExit("nothing to draw: no tax case was measured")
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(8.5, 0.8 + 2.1 * lines), squeeze=False, layout="constrained")
    for case, panel in itertools.zip_longest(cases, panels.flat):
        if case is None:
            panel.set_visible(False)
        else:
            _panel(panel, case, with_names=panel in panels[:, 0])
    figure.suptitle(
        "What a gradient reversal layer adds to forward + backward", fontsize=13, fontweight="bold", x=0.01, ha="left"
    )
    facts = document["environment"]
    where = (
        f"{facts['device_name']}, CPU threads {facts['threads']}" if facts["device"] == "cpu" else facts["device_name"]
    )
    figure.supxlabel(
        f"time over a plain view in the same chain; bar: median, line: middle half of the paired rounds\n"
        f"{where}, {facts['dtype']}, torch {facts['torch']}, eager, commit {facts['commit'] or 'unknown'}",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _panel(panel: Axes, case: dict, with_names: bool) -> None:
    rows = [row for row in case["rows"] if row["section"] == "eager" and row["cost"]]
    unit, size = ("ms", 1e-3) if max(row["cost"]["median"] for row in rows) >= 1e-3 else ("µs", 1e-6)
    right = max(row["cost"]["q3"] for row in rows) / size
    for place, row in enumerate(rows):
        middle, q1, q3 = (row["cost"][key] / size for key in ("median", "q1", "q3"))
        panel.barh(place, middle, height=0.62, color=COLOURS.get(row["kind"], PEERS))
        panel.plot([q1, q3], [place, place], color="black", linewidth=1)
        panel.text(
            max(q3, 0.0) + 0.03 * right,
            place,
            f"{middle:.2g}" if abs(middle) < 10 else f"{middle:.0f}",
            va="center",
            fontsize=9,
        )
    panel.set_yticks(
        range(len(rows)), [NAMES.get(row["name"], row["name"]) for row in rows] if with_names else [], fontsize=10
    )
    for label, row in zip(panel.get_yticklabels(), rows, strict=False):
        if row["kind"] == "ours":
            label.set(color=COLOURS["ours"], fontweight="bold")
    panel.set_title(f"{case['name'].removeprefix('tax/')} elements, {unit}", fontsize=10, loc="left")
    panel.set_xlim(right=1.2 * right)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=9)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
