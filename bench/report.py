"""From samples to statistics, and from statistics to a table and to JSON."""

from dataclasses import asdict, dataclass

from cases import Case, Remarks, Row, Work
from measure import Spread, is_above, paired_difference, paired_ratio

Samples = dict[Row, list[float]]

# The same code at another address differs by this share of a step; a smaller difference is not the layer's.
NOTICEABLE = 0.01


@dataclass(frozen=True)
class RowResult:
    name: str
    kind: str
    section: str
    total: Spread  # seconds or bytes of the whole step
    cost: Spread | None  # what the comparison is about: the total, or what it has over the identity's
    to_reference: Spread | None
    to_best_peer: Spread | None
    remark: str | None  # how the result deviates from what it should be


@dataclass(frozen=True)
class CaseResult:
    name: str
    title: str
    unit: str  # "s", "B" or "launches"
    cost: str  # what `cost` is, in words
    yardstick: str
    reference: dict[str, str]  # by section: the row's name
    best_peer: dict[str, str]  # by section: the fastest row that is not ours, the reference among them
    slower: list[str]  # which rows ours loses to, beyond the noise
    rows: list[RowResult]


def summarise(case: Case, work: Work, samples: Samples, remarks: Remarks | None = None) -> CaseResult:
    remarks = {} if remarks is None else remarks
    rows, references, best_peer, slower = [], {}, {}, []
    for section in dict.fromkeys(row.section for row in work.rows):
        members = [row for row in work.rows if row.section == section]
        cost = _costs(case, members, samples)
        rivals = [row for row in cost if row.kind in ("reference", "peer")]
        reference = next((row for row in rivals if row.kind == "reference"), None)
        best = min(rivals, key=lambda row: Spread.of(cost[row]).median, default=None)
        if reference:
            references[section] = reference.name
        if best:
            best_peer[section] = best.name
        for row in members:
            rows.append(
                RowResult(
                    row.name,
                    row.kind,
                    section,
                    Spread.of(samples[row]),
                    Spread.of(cost[row]) if row in cost else None,
                    paired_ratio(cost[row], cost[reference]) if row in cost and reference else None,
                    paired_ratio(cost[row], cost[best]) if row in cost and best else None,
                    remarks.get(row),
                )
            )
        slower += [
            f"{section} {rival.name}"
            for ours in cost
            for rival in rivals
            if ours.kind == "ours" and is_above(cost[ours], cost[rival], NOTICEABLE * Spread.of(samples[rival]).median)
        ]
    unit = {"time": "s", "memory": "B", "launches": "launches"}[case.measures]
    compared = "over identity" if case.subtract_identity else "step"
    return CaseResult(case.name, case.title, unit, compared, work.yardstick, references, best_peer, slower, rows)


def _costs(case: Case, members: list[Row], samples: Samples) -> Samples:
    """What is compared, by row. A yardstick is never a difference: it is the cost itself."""
    identity = next((row for row in members if row.kind == "identity"), None)
    if not case.subtract_identity or identity is None:
        return {row: samples[row] for row in members}
    return {
        row: samples[row] if row.kind == "yardstick" else paired_difference(samples[row], samples[identity])
        for row in members
        if row is not identity
    }


def as_json(result: CaseResult) -> dict:
    return asdict(result)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

_UNITS = {
    "s": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)),
    "B": (("MB", 1e6), ("kB", 1e3), ("B", 1.0)),
    "launches": (("launches", 1.0),),
}


def _scale(result: CaseResult) -> tuple[str, float]:
    """The unit in which the largest total has at least one digit before the point."""
    largest = max(row.total.median for row in result.rows)
    return next(((name, size) for name, size in _UNITS[result.unit] if largest >= size), _UNITS[result.unit][-1])


def _number(value: float) -> str:
    """Three digits where there are decimals to drop; never scientific notation."""
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _cell(spread: Spread | None, size: float, width: int) -> str:
    if spread is None:
        return "-".rjust(width)
    text = _number(spread.median / size)
    if spread.n > 1:
        text += f" [{_number(spread.q1 / size)} .. {_number(spread.q3 / size)}]"
    return text.rjust(width)


def table(result: CaseResult) -> str:
    unit, size = _scale(result)
    taxed = result.cost != "step"
    width = max(len(row.name) for row in result.rows)
    lines = [f"{result.name}: {result.title}"]
    header = f"  {'':<{width}}{f'step, {unit}':>24}" + (f"{f'{result.cost}, {unit}':>28}" if taxed else "")
    lines.append(header + f"{'/ reference':>24}{'/ best peer':>24}")
    for section, best in result.best_peer.items():
        lines.append(f"{section} (reference: {result.reference.get(section, 'none')}; best peer: {best})")
        for row in (row for row in result.rows if row.section == section):
            mark = ">" if row.kind == "ours" else " "
            total = _cell(None if taxed and row.kind == "yardstick" else row.total, size, 24)
            line = f"{mark} {row.name:<{width}}{total}" + (_cell(row.cost, size, 28) if taxed else "")
            lines.append(line + _cell(row.to_reference, 1.0, 24) + _cell(row.to_best_peer, 1.0, 24))
            if row.remark:
                lines.append(f"    (its own result: {row.remark})")
    rounds = max(row.total.n for row in result.rows)
    lines.append(
        f"  {f'median [quartiles] of {rounds} rounds, paired within a round' if rounds > 1 else 'counted exactly'}"
    )
    lines.append(f"  {result.yardstick}")
    verdict = f"above {', '.join(result.slower)}" if result.slower else "above no other row beyond the noise"
    lines.append(f"  grl_ext is {verdict}")
    return "\n".join(lines)
