"""The goals of a day with a GPU (gpu.py), and whether what bench/compare.py measured there meets them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import heads

DTYPES = ("float32", "bfloat16")

Rows = dict[str, dict]  # of a case, by name: as bench/compare.py writes them


@dataclass(frozen=True)
class Goal:
    text: str
    case: str  # a pattern for the case's name
    dtype: str
    # Whether it is met, and the figure. Raises Missing where a row that it needs was not measured.
    holds: Callable[[Rows], tuple[bool, str]]


class Missing(Exception):
    """There is no such row."""


def named(rows: Rows, what: str, matches: Callable[[dict], bool], choose: Callable = min) -> tuple[str, float]:
    """The name and the median of the fastest such row, or of the slowest by choose=max."""
    medians = {name: row["total"]["median"] for name, row in rows.items() if matches(row)}
    if not medians:
        raise Missing(f"no row {what}")
    return choose(medians.items(), key=lambda item: item[1])


def fused(rows: Rows) -> float:
    return named(rows, heads.FUSED, lambda row: row["name"] == heads.FUSED)[1]


def pasted(rows: Rows) -> float:
    return named(rows, "pasted", lambda row: row["kind"] == "reference")[1]


def every_form_within(copies: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        name, slowest = named(rows, "of ours", lambda row: row["kind"] == "ours", max)
        copy = named(rows, "yardstick", lambda row: row["kind"] == "yardstick")[1]
        return slowest <= copies * copy, f"{100 * copy / slowest:.1f} % of the copy's bandwidth, {name}"

    return holds


def within(copies: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        copy = named(rows, heads.COPY, lambda row: row["name"] == heads.COPY)[1]
        ratio = fused(rows) / copy
        return ratio <= copies, f"{ratio:.2f} copies"

    return holds


def times_pasted(factor: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        ratio = pasted(rows) / fused(rows)
        graphs = [row for name, row in rows.items() if name == f"{heads.FUSED} in a CUDA graph"]
        also = "".join(f", {pasted(rows) / row['total']['median']:.1f} in a CUDA graph" for row in graphs)
        return ratio >= factor, f"{ratio:.1f} times{also}"

    return holds


def times_compiled(factor: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        name, best = named(rows, "compiled", lambda row: row["name"].startswith("compiled"))
        return best >= factor * fused(rows), f"{best / fused(rows):.1f} times {name}"

    return holds


def over_linear(rows: Rows) -> tuple[bool, str]:
    ratio = (
        named(rows, "of ours", lambda row: row["kind"] == "ours")[1]
        / named(rows, "nn.Linear", lambda row: row["kind"] == "peer")[1]
    )
    return ratio <= 1.01, f"{ratio:.3f} of nn.Linear"


def at_most(launches: int) -> Callable[[Rows], tuple[bool, str]]:
    return lambda rows: (fused(rows) <= launches, f"{fused(rows):.0f} launches")


# The shapes whose features are 256 MB.
LARGE = {"float32": "heads/65536x1024_", "bfloat16": "heads/65536x2048_"}

GOALS = (
    *(
        Goal(
            "scale-and-negate at 95 % of a copy's bandwidth in every form",
            r"bandwidth/",
            d,
            every_form_within(1 / 0.95),
        )
        for d in DTYPES
    ),
    Goal(
        "heads and loss within 1.3 copies, up to 12 columns", LARGE["float32"] + r"(2|10)\+2$", "float32", within(1.3)
    ),
    Goal(
        "heads and loss within 1.5 copies, up to 32 columns",
        LARGE["bfloat16"] + r"(2|10|30)\+2$",
        "bfloat16",
        within(1.5),
    ),
    *(
        Goal("heads and loss 5 times as fast as layer by layer, 256 MB of features", LARGE[d], d, times_pasted(5))
        for d in DTYPES
    ),
    *(
        Goal("heads and loss 2 times as fast as the best compiled row, 256 MB", LARGE[d], d, times_compiled(2))
        for d in DTYPES
    ),
    *(
        Goal(
            "heads and loss 5 times as fast as layer by layer, wall-clock, 128x256",
            r"heads/128x256_",
            d,
            times_pasted(5),
        )
        for d in DTYPES
    ),
    *(Goal("heads and loss in 4 launches or fewer, 128x256", r"heads_launches/", d, at_most(4)) for d in DTYPES),
    *(Goal("GRLLinear within 1 % of nn.Linear", r"grl_linear/", d, over_linear) for d in DTYPES),
)


def goals_met(folder: Path) -> list[str]:
    """A line for each goal, case and file of results, which names the path that was measured. A goal that no case was
    measured for has a line that says so."""
    lines = []
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for goal in GOALS:
        cases = [
            (source, case)
            for source, document in documents.items()
            if document["environment"]["dtype"] == goal.dtype
            for case in document["cases"]
            if re.match(goal.case, case["name"])
        ]
        if not cases:
            lines.append(f"| {goal.text} | {goal.dtype} | - | not measured |")
        for source, case in cases:
            try:
                good, figure = goal.holds({row["name"]: row for row in case["rows"]})
                verdict = f"{figure}: {'met' if good else '**missed**'}"
            except Missing as missing:
                verdict = f"not measured: {missing}"
            lines.append(f"| {goal.text} | {source} | {case['name']} | {verdict} |")
    return lines
