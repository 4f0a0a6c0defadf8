"""The matrix's outcomes as tables: `docs/works-with.md`, a short form first and then all of them."""

import json
import re
from pathlib import Path

from matrix.networks import COMMON, HEADS, OURS
from matrix.rows import ROWS, YES

ROOT = Path(__file__).parents[2]
OUTCOMES = Path(__file__).with_name("outcomes.json")
PAGE = ROOT / "docs" / "works-with.md"

INTRODUCTION = """\
# What it works with

This page answers in which set-ups of PyTorch the gradient is right. Each cell is a test: a small network with an
encoder, a predictor and an adversary is run through the set-up, and its values and all its gradients are compared with
the same network in plain PyTorch, layer by layer. `tests/matrix` holds the tests and writes this page; `make test`
fails where the two differ.

- **yes**: right, on the compiled path and on the one in pure Python.
- **refused**: an error, with what to do instead. No cell of grl_ext is a wrong gradient. What no cell tries, and is not
  right, is said under [the layer](layer.md) (infinite features in `make_fx`, and under `torch.func` inside
  `torch.compile`).
- **λ a number**, **λ a tensor, for each row**: given to the module's call, to `gradient_reversal` and to `grl_linear`.
- **the common Python layer**: the `torch.autograd.Function` that most code bases have pasted in, in the same
  network. *Not reversed* means that the features help the adversary, without a warning. *Wrong gradient* is any other.
- **-**: not tried, because PyTorch's own linear layers do not take it, or the row is about a λ that a module holds.

Measured on torch {torch}. Rows with ** need other packages, or more time than the rest: `make matrix` runs them. So it
does with the pure-Python path of rows with *.

## In short

The number is how many set-ups the group has.
"""

Outcomes = dict[str, dict[str, dict[str, str]]]  # of row, column and path


def read() -> tuple[str, Outcomes]:
    """The version of torch that they are of, and the outcomes."""
    written = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {"torch": "", "outcomes": {}}
    return written["torch"], written["outcomes"]


class Notes:
    """Sentences too long for a cell, by number."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def short(self, outcome: str) -> str:
        kind, _, sentence = outcome.partition(": ")
        if not sentence:
            return outcome
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return f"{kind} [{self.sentences.index(sentence) + 1}]"

    def cell(self, of_paths: dict[str, str] | None) -> str:
        if not of_paths:
            return "-"
        short = {path: self.short(outcome) for path, outcome in of_paths.items()}
        if len(set(short.values())) == 1:
            return next(iter(short.values()))
        return "; ".join(
            f"{'pure Python' if path == 'fallback' else path}: {outcome}" for path, outcome in short.items()
        )


def groups() -> dict[str, list[str]]:
    """The rows' names by group, those that need nothing else first."""
    result: dict[str, list[str]] = {}
    for name, row in sorted(ROWS.items(), key=lambda item: len(item[1].heavy) == 2):
        result.setdefault(row.group, []).append(name)
    return result


def page(outcomes: Outcomes, torch_version: str) -> str:
    notes, lines = Notes(), [INTRODUCTION.format(torch=torch_version), short_form(outcomes)]
    for group, names in groups().items():
        lines += [f"\n## {group}\n", "| | " + " | ".join((*OURS, COMMON)) + " |", "|---" * (len(OURS) + 2) + "|"]
        for name in names:
            cells = [notes.cell(outcomes.get(name, {}).get(column)) for column in (*OURS, COMMON)]
            lines.append(
                f"| {name}{' ' + '*' * len(ROWS[name].heavy) if ROWS[name].heavy else ''} | " + " | ".join(cells) + " |"
            )
    if notes.sentences:
        lines.append("\n## Notes\n")
        lines += [f"{i}. {sentence[0].upper()}{sentence[1:]}." for i, sentence in enumerate(notes.sentences, 1)]
    return "\n".join(lines) + "\n"


def short_form(outcomes: Outcomes) -> str:
    """One row for each group: what all cells of grl_ext give, and in which set-ups the common layer fails."""
    lines = ["| set-ups | grl_ext | the common Python layer |", "|---|---|---|"]
    for group, names in groups().items():
        lines.append(f"| {group}: {len(names)} | {_ours(names, outcomes)} | {_common(names, outcomes)} |")
    return "\n".join(lines)


def _ours(names: list[str], outcomes: Outcomes) -> str:
    refused: dict[str, list[str]] = {}
    for name in names:
        columns = [
            column for column in OURS if any(outcome != YES for outcome in outcomes[name].get(column, {}).values())
        ]
        if columns:
            others = ", ".join(column for column in OURS if column in outcomes[name] and column not in columns)
            refused.setdefault("the heads" if columns == list(HEADS) else f"all but {others}", []).append(name)
    return "; ".join(["yes", *(f"refused for {columns}: {', '.join(own)}" for columns, own in refused.items())])


def _common(names: list[str], outcomes: Outcomes) -> str:
    failures: dict[str, list[str]] = {}
    for name in names:
        outcome = outcomes[name].get(COMMON, {}).get("compiled", YES)
        if outcome != YES:
            failures.setdefault(outcome, []).append(re.sub(r" \(.*?\)", "", name))
    if not failures:
        return "yes"
    parts = [
        f"**{outcome}**: " + ("all" if len(names) == len(own) else ", ".join(own)) for outcome, own in failures.items()
    ]
    return "; ".join(parts)
