"""The figures in the README and the pages are those in the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README, MEASURED, EXPERIMENTS = ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "examples" / "README.md"
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = {isa: json.loads((RESULTS / f"cpu-{isa}-float32.json").read_text()) for isa in ("avx512", "avx2")}
CASES = {
    isa: {case["name"]: {(row["section"], row["name"]): row for row in case["rows"]} for case in document["cases"]}
    for isa, document in DOCUMENTS.items()
}
FUSED = "heads(features, targets)"

pytestmark = pytest.mark.once


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    below = re.split(rf"\n##+ {heading}\n", page.read_text(), maxsplit=1)[1]
    lines = re.search(r"^\|.*?(?=^[^|]|\Z)", below, re.DOTALL | re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def median(case: str, row: str, measure: str = "total", section: str = "eager", isa: str = "avx512") -> float:
    return CASES[isa][case][section, row][measure]["median"]


def test_the_pages_name_the_commit_that_the_figures_are_of():
    (commit,) = {document["environment"]["commit"][:7] for document in DOCUMENTS.values()}
    for page in (README, MEASURED):
        assert f"commit {commit}" in " ".join(page.read_text().split())


def test_bytes_are_the_same_on_both_instruction_sets():
    for case in CASES["avx512"]:
        if case.startswith(("heads_memory/", "memory/")):
            for _, name in CASES["avx512"][case]:
                assert median(case, name, isa="avx512") == pytest.approx(median(case, name, isa="avx2"), rel=1e-6), name


def test_each_result_is_of_the_instruction_set_in_its_name():
    for isa, document in DOCUMENTS.items():
        facts = document["environment"]
        assert (facts["grl_ext"]["cpu_isa"], facts["torch_isa"].lower()) == (isa, isa)


CASE_OF_ROW = {
    "128 x 256, 10 + 2": "heads/128x256_10+2",
    "1000 x 1764, 2 + 2": "heads/1000x1764_2+2",
    "4096 x 1024, 10 + 2": "heads/4096x1024_10+2",
    "16384 x 2048, 31 + 2": "heads/16384x2048_31+2",
    "1000 x 1764, 2 + 2, weights": "heads_weighted/1000x1764_2+2",
    "4096 x 1024, 10 + 2, weights": "heads_weighted/4096x1024_10+2",
    "4096 x 1024, 10 + 1 value": "heads_mse/4096x1024_10+1",
    "4096 x 1024, 10 + 5 labels": "heads_bce/4096x1024_10+5",
    "64 x 256, 10 + 1024-1024-2": "heads_hidden/64x256_10+1024-1024-2",
    "128 x 768, 100-100-10 + 100-2": "heads_hidden/128x768_100-100-10+100-2",
    "4096 x 1024, 10 + 1024-1024-2": "heads_hidden/4096x1024_10+1024-1024-2",
}


@pytest.mark.parametrize(("isa", "heading"), [("avx512", "The heads with AVX-512"), ("avx2", "The heads with AVX2")])
def test_the_heads_table_is_the_committed_run(isa, heading):
    rows = table(MEASURED, heading)
    assert [row[0] for row in rows] == list(CASE_OF_ROW)
    for title, *cells in rows:
        case = CASE_OF_ROW[title]
        names = ["pasted", "compiled pasted", "F.linear_cross_entropy", "heads(features)", FUSED]
        ours = median(case, FUSED, isa=isa)
        for name, cell in zip(names, cells, strict=False):
            if ("eager", name) not in CASES[isa][case]:
                assert cell == "-", (title, name)
                continue
            time = median(case, name, isa=isa)
            ratio = "" if name == FUSED else f" ({time / ours:.1f})"
            assert cell == f"{time * 1e3:.3g}{ratio}", (title, name)
        yardstick = max(
            row["total"]["median"] for (_, name), row in CASES[isa][case].items() if name.startswith("yardstick")
        )
        assert cells[-1] == f"{yardstick * 1e3:.3g}", title


def test_the_layers_table_is_the_committed_run():
    sizes = {"64": 1e-6, "4k": 1e-6, "1M": 1e-6, "16M": 1e-3}
    for title, *cells in table(MEASURED, "The layer"):
        section = "compiled" if "compiled" in title else "eager"
        others = ("grl_ext", "tuned", "pytorch-revgrad", "pytorch-adapt")
        name = next((other for other in others if other in title.split(":")[0]), "pasted")
        for (size, unit), cell in zip(sizes.items(), cells, strict=True):
            if cell == "-":
                assert (section, name) not in CASES["avx512"][f"tax/{size}"]
            else:
                found = median(f"tax/{size}", name, "cost", section) / unit
                assert float(cell) == pytest.approx(found, rel=0.006, abs=0.0006), (title, size)


def shares(group: str, name: str, measure: str) -> list[float]:
    """Of all shapes, on both instruction sets."""
    return [
        median(case, name, measure, isa=isa)
        for isa, cases in CASES.items()
        for case in cases
        if case.startswith(f"{group}/") or case == group
    ]


def test_the_shares_are_those_of_all_shapes_on_both_instruction_sets():
    for _, of_reference, of_best, group in table(MEASURED, "In short"):
        group = group.strip("`")
        ours = {"tax": "grl_ext", "grl_linear": "GRLLinear"}.get(group, FUSED)
        for cell, measure in ((of_reference, "to_reference"), (of_best, "to_best_peer")):
            if group == "founding":
                found = [share for name in ("grl_ext", "AdversarialHeads") for share in shares(group, name, measure)]
            elif group == "tax":
                sizes = ("tax/64", "tax/4k", "tax/16M")
                found = [median(case, ours, measure, isa=isa) for isa in CASES for case in sizes]
            else:
                found = shares(group, ours, measure)
            shown = [float(number) for number in re.findall(r"\d\.\d\d", cell)]
            assert shown[0] == pytest.approx(min(found), abs=0.0051), (group, measure)
            assert shown[-1] == pytest.approx(max(found), abs=0.0051), (group, measure)


def test_the_readmes_figures_are_the_committed_run():
    text = " ".join(README.read_text().split())
    layer = [median("tax/64", name, "cost") * 1e6 for name in ("grl_ext", "pasted")]
    assert f"adds {layer[0]:.1f} µs to a small eager step; the common Python layer adds {layer[1]:.0f} µs" in text
    large = [median("tax/16M", name, "cost") * 1e3 for name in ("grl_ext", "pasted")]
    assert f"it is {large[0]:.1f} ms against {large[1]:.0f} ms" in text
    assert f"and this one {median('tax/64', 'grl_ext', 'cost', 'compiled') * 1e6:.1f} µs" in text
    linear, hidden = (shares(group, FUSED, "to_reference") for group in ("heads", "heads_hidden"))
    assert f"take {min(linear):.2f} to {max(linear):.2f} of the time of layers one by one" in text
    assert f"it is {min(hidden):.2f} to {max(hidden):.2f}" in text
    memory = [median("heads_memory/4096x1024_10+2", name) / 1e6 for name in (FUSED, "pasted")]
    assert f"need {memory[0]:.0f} MB on top" in text
    assert f"layers one by one need {memory[1]:.0f} MB" in text
    # Hidden layers: sizes joined by a dash.
    with_hidden = [case for case in CASES["avx512"] if case.startswith("heads_memory/") and "-" in case]
    kept = [median(case, FUSED, "to_reference") for case in with_hidden]
    assert f"it is {min(kept):.2f} to {max(kept):.2f} of theirs" in text


@pytest.mark.parametrize("page", [README, EXPERIMENTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_spread_that_a_page_shows_is_in_the_results(page):
    # 0.907 ± 0.016: some experiment's finding, or a mean and deviation in its results.
    known = set()

    def collect(found: object) -> None:
        if isinstance(found, dict) and found.keys() >= {"mean", "sd"}:
            known.update(f"{found['mean']:.{digits}f} ± {found['sd']:.{digits}f}" for digits in range(5))
        elif isinstance(found, dict):
            for value in found.values():
                collect(value)

    for file in (ROOT / "examples" / "results").rglob("metrics.json"):
        collect(json.loads(file.read_text())["results"])
    shown = re.findall(r"\d[\d.]* ± \d[\d.]*\d|\d+ ± \d+", page.read_text())
    assert len(shown) >= 3
    for spread in shown:
        assert spread.rstrip(".") in known, spread
