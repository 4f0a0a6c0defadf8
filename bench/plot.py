"""Draws the layer's overhead (the cases `tax`) from a document that compare.py wrote, as its --plot does, and the
heads' times from that one and others, side by side: `python bench/plot.py overhead.png heads.png results.json ...`"""

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
        [[case] for case in cases],
        [document["environment"]],
        "cost",
        title="What a gradient reversal layer adds to forward + backward",
        below="time over a plain view in the same chain; bar: median, line: middle half of the paired rounds\n"
        "one mul_ is called from Python by itself; grl_ext multiplies in C++, within the backward, and may take less",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_heads(documents: list[dict], path: Path) -> None:
    """One panel per shape, one bar per eager row and document, with its own scale as above."""
    cases = [[case for case in document["cases"] if case["name"].startswith(HEADS)] for document in documents]
    if not all(cases):
        raise SystemExit("nothing to draw: no case of heads was measured")
    _check_alike(documents, cases)
    figure = _panels(
        list(zip(*cases, strict=True)),
        [document["environment"] for document in documents],
        "total",
        title="Heads and their losses: forward + backward",
        below="bar: median, line: middle half of the rounds; the shapes are features, then the sizes of the heads",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _check_alike(documents: list[dict], cases: list[list[dict]]) -> None:
    """Because bars stand beside each other by their places, under the names and facts of the first document."""
    if len(documents) > 2:
        raise SystemExit(f"at most two documents can be told apart, got {len(documents)}")
    rows = [[(case["name"], [row["name"] for row in _rows(case, "total")]) for case in own] for own in cases]
    facts = [
        [document["environment"][key] for key in ("device_name", "dtype", "threads", "torch")] for document in documents
    ]
    for what, found in (("cases and rows", rows), ("device, dtype, threads and torch", facts)):
        if any(own != found[0] for own in found):
            raise SystemExit(f"the documents do not have the same {what}")


def _panels(groups: list[list[dict]], facts: list[dict], measure: str, title: str, below: str) -> Figure:
    """A panel for each group, which is one case in each of the documents that the facts are of."""
    columns = min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    most = max(len(_rows(cases[0], measure)) for cases in groups)
    size = (5.2 * columns, 1.0 + lines * (0.6 + (0.14 + 0.12 * len(facts)) * most))
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for cases, panel in itertools.zip_longest(groups, panels.flat):
        if cases is None:
            panel.set_visible(False)
        else:
            _panel(panel, cases, measure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    if len(facts) > 1:
        sets = [own["grl_ext"]["cpu_isa"] for own in facts]
        below = f"dark: {sets[0]}, light: {', '.join(sets[1:])}\n{below}"
    first = facts[0]
    where = first["device_name"] + (f", CPU threads {first['threads']}" if first["device"] == "cpu" else "")
    commits = ", ".join(dict.fromkeys(own["commit"] or "unknown" for own in facts))
    figure.supxlabel(
        f"{below}\n{where}, {first['dtype']}, torch {first['torch']}, eager, commit {commits}",
        fontsize=9,
        color="#555555",
    )
    return figure


def _rows(case: dict, measure: str) -> list[dict]:
    """The chunked form takes several times as long as all others, which would not be told apart beside it."""
    return [row for row in case["rows"] if row["section"] == "eager" and row[measure] and "chunked" not in row["name"]]


def _panel(panel: Axes, cases: list[dict], measure: str) -> None:
    by_case = [_rows(case, measure) for case in cases]
    every = [row for rows in by_case for row in rows]
    unit, size = ("ms", 1e-3) if max(row[measure]["median"] for row in every) >= 1e-3 else ("µs", 1e-6)
    right = max(row[measure]["q3"] for row in every) / size
    height = 0.74 / len(cases)
    for index, rows in enumerate(by_case):
        for line, row in enumerate(rows):
            place = line + height * (index - (len(cases) - 1) / 2)
            middle, q1, q3 = (row[measure][key] / size for key in ("median", "q1", "q3"))
            colour = COLOURS.get(row["kind"], PEERS)
            panel.barh(place, middle, height=0.85 * height, color=colour, alpha=1.0 if index == 0 else 0.55)
            panel.plot([q1, q3], [place, place], color="black", linewidth=1)
            panel.text(
                max(q3, 0.0) + 0.03 * right,
                place,
                f"{middle:.3g}" if abs(middle) < 10 else f"{middle:.0f}",
                va="center",
                fontsize=9 if len(cases) == 1 else 7.5,
            )
    rows = by_case[0]
    panel.set_yticks(range(len(rows)), [NAMES.get(row["name"], row["name"]) for row in rows], fontsize=9)
    for label, row in zip(panel.get_yticklabels(), rows, strict=False):
        if row["kind"] == "ours":
            label.set(color=COLOURS["ours"], fontweight="bold")
    kind, shape = cases[0]["name"].split("/")
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
    overhead, heads, *documents = map(Path, sys.argv[1:])
    measured = [json.loads(document.read_text()) for document in documents]
    draw(measured[0], overhead)
    draw_heads(measured, heads)
