"""The matrix's rows: what a row is, and the outcome of a cell."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matrix.networks import COMMON, OURS, Network, eager, network, plain_like
from torch import Tensor

YES = "yes"
NOT_REVERSED, WRONG, ERROR = "not reversed", "wrong gradient", "error"  # of the common layer; grl_ext has none of these


PATHS = ("compiled", "fallback")
HERE, IN_TWO_PROCESSES = "here", "in two processes"


class Refusal(NamedTuple):
    """An error that is documented: which columns raise it, what its text matches, and the sentence that the table
    shows."""

    columns: Sequence[str]
    error: str
    sentence: str
    paths: Sequence[str] = PATHS


class Row(NamedTuple):
    group: str
    name: str
    run: Callable[[Network], list[Tensor]]  # values and gradients through the set-up
    expected: Callable[[Network], list[Tensor]]  # the same of a plain network, without the set-up
    columns: Sequence[str]
    refusals: Sequence[Refusal]
    rtol: float | None
    atol: float | None
    where: str
    heavy: Sequence[
        str
    ]  # on which paths only `make matrix` runs it: for packages that the tests' environment lacks, or for its time


ROWS: dict[str, Row] = {}


def row(
    group: str,
    name: str,
    *refusals: Refusal,
    expected: Callable[[Network], list[Tensor]] = eager,
    columns: Sequence[str] = (*OURS, COMMON),
    rtol: float | None = None,
    atol: float | None = None,
    where: str = HERE,
    heavy: Sequence[str] = (),
):
    """Registers the decorated function: network -> values and gradients through the set-up."""

    def register(run):
        assert name not in ROWS, name
        ROWS[name] = Row(group, name, run, expected, columns, refusals, rtol, atol, where, heavy)
        return run

    return register


def _differs(found: Sequence[Tensor], expected: Sequence[Tensor], row: Row) -> str | None:
    assert len(found) == len(expected), (len(found), len(expected))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), f"result {i} is {a}, plain PyTorch has {b}"
        if a is not None:
            try:
                torch.testing.assert_close(
                    a.detach(), b.detach(), rtol=row.rtol, atol=row.atol, check_dtype=row.rtol is None
                )
            except AssertionError as error:
                return f"result {i}: {error}"
    return None


def outcome(row: Row, column: str, path: str) -> str:
    """What the cell gives. Raises where grl_ext gives anything that is neither right nor a documented refusal."""
    made = network(column)
    plain = plain_like(made)
    plain.column = column
    try:
        found = row.run(made)
    except Exception as error:
        if column == COMMON:
            return ERROR
        for refusal in row.refusals:
            if column in refusal.columns and path in refusal.paths and re.search(refusal.error, str(error)):
                return refusal.sentence
        raise
    difference = _differs(found, row.expected(plain), row)
    if difference is None:
        return YES
    if column != COMMON:
        raise AssertionError(difference)
    plain.reversal = torch.nn.Identity()
    return WRONG if _differs(found, row.expected(plain), row) else NOT_REVERSED
