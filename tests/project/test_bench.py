"""The benchmark's own arithmetic and its check, without any timing: a wrong comparison is worse than none."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))  # the benchmark is a set of scripts, not part of the package

import bandwidth  # noqa: E402
import baselines  # noqa: E402
import cases  # noqa: E402
import compare  # noqa: E402
import conditioning  # noqa: E402
import founding  # noqa: E402
import heads  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402

pytestmark = pytest.mark.once


class FakeClock:
    """Time passes only when a step says so, and steps take longer from round to round, as on a machine that heats
    up."""

    def __init__(self) -> None:
        self.now = 0.0
        self.drift = 1.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float):
        def run() -> None:
            self.now += seconds * self.drift

        return run

    def drifting(self, rounds):
        for round_ in rounds:
            self.drift = 1.0 + round_ / 10
            yield round_


SETTINGS = cases.Settings("cpu", torch.float32, quick=True)


def rows_of(**seconds: float) -> list[cases.Row]:
    kinds = {"identity": "identity", "pasted": "reference", "ours": "ours", "yardstick": "yardstick"}
    return [cases.Row(name, kinds.get(name, "peer"), lambda: None) for name in seconds]


def interleaved(clock: FakeClock, rows: list[cases.Row], seconds: dict[str, float]) -> report.Samples:
    steps = {row: clock.step(seconds[row.name]) for row in rows}
    return measure.interleave(steps, measure.wall_timer(clock), seconds=0.0, min_rounds=20, progress=clock.drifting)


def test_samples_are_seconds_per_call_whatever_the_repeats():
    clock = FakeClock()
    samples = measure.interleave(
        {"short": clock.step(1e-6), "long": clock.step(0.5)}, measure.wall_timer(clock), seconds=5.0, min_rounds=2
    )
    # 5 s for rounds of 0.5 s and one sample; the tolerance covers the fake clock's floating-point sum.
    assert len(samples["short"]) == len(samples["long"]) == int(5.0 / (0.5 + measure.SAMPLE_SECONDS))
    assert samples["short"] == pytest.approx([1e-6] * 9, rel=1e-9)
    assert samples["long"] == pytest.approx([0.5] * 9, rel=1e-9)


def test_ratios_are_taken_within_a_round_so_that_drift_cancels():
    seconds = {"identity": 10e-3, "pasted": 30e-3, "tuned": 18e-3, "ours": 11e-3, "yardstick": 2e-3}
    rows = rows_of(**seconds)
    samples = interleaved(FakeClock(), rows, seconds)
    assert max(samples[rows[0]]) > 1.5 * min(samples[rows[0]])  # the drift is there
    case = cases.Case("fake", "", lambda: None, subtract_identity=True)
    result = report.summarise(case, cases.Work(rows, lambda: None, ""), samples)
    by_name = {row.name: row for row in result.rows}
    assert (result.reference, result.best_peer) == ({"eager": "pasted"}, {"eager": "tuned"})
    assert by_name["identity"].cost is None
    for name, tax in {"pasted": 20, "tuned": 8, "ours": 1, "yardstick": 2}.items():
        for found, expected in ((by_name[name].to_reference, tax / 20), (by_name[name].to_best_peer, tax / 8)):
            assert (found.q1, found.median, found.q3) == pytest.approx((expected,) * 3, rel=1e-6)
    assert result.slower == []


def test_a_slower_row_of_ours_is_named():
    seconds = {"pasted": 30e-3, "tuned": 18e-3, "ours": 20e-3}
    rows = rows_of(**seconds)
    case = cases.Case("fake", "", lambda: None)
    result = report.summarise(case, cases.Work(rows, lambda: None, ""), interleaved(FakeClock(), rows, seconds))
    assert result.slower == ["eager tuned"]
    assert "grl_ext is above eager tuned" in report.table(result)


def test_sections_are_compared_within_themselves():
    rows = [cases.Row("pasted", "reference", lambda: None), cases.Row("pasted", "reference", lambda: None, "compiled")]
    ours = [cases.Row("ours", "ours", lambda: None), cases.Row("ours", "ours", lambda: None, "compiled")]
    samples = {rows[0]: [4.0] * 3, rows[1]: [2.0] * 3, ours[0]: [1.0] * 3, ours[1]: [1.0] * 3}
    case = cases.Case("fake", "", lambda: None)
    result = report.summarise(case, cases.Work(list(samples), lambda: None, ""), samples)
    found = {(row.section, row.name): row.to_reference.median for row in result.rows}
    assert found == {
        ("eager", "pasted"): 1,
        ("eager", "ours"): 0.25,
        ("compiled", "pasted"): 1,
        ("compiled", "ours"): 0.5,
    }


def test_no_ratio_to_what_cannot_be_told_from_zero():
    assert measure.paired_ratio([1.0] * 4, [-0.1, 0.1, -0.1, 0.2]) is None
    assert measure.paired_ratio([0.0], [0.0]) is None


def test_noise_is_no_difference():
    high_and_low = [1.0, 1.2] * 10
    assert not measure.is_above(high_and_low, high_and_low[::-1], margin=0.0)
    assert not measure.is_above([1.001] * 20, [1.0] * 20, margin=0.01)
    assert measure.is_above([1.1] * 20, [1.0] * 20, margin=0.01)


def test_peak_memory_counts_what_is_held_at_a_time():
    def step() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = torch.empty(600, dtype=torch.uint8)
        del b, c

    assert measure.peak_memory(step, "cpu") == 1500


@pytest.mark.parametrize("group", ["tax/64", "founding"])
@pytest.mark.parametrize("wrong", [lambda coeff: baselines.Pasted(-coeff), lambda coeff: baselines.Tuned(2 * coeff)])
def test_check_catches_a_wrong_layer(monkeypatch, group, wrong):
    if group == "founding":
        pytest.importorskip("sklearn")
    for kind in ("ours", "peer"):
        layers = [
            baselines.Layer("identity", "identity", lambda coeff: baselines.Identity()),
            baselines.Layer("bad", kind, wrong),
        ]
        monkeypatch.setattr(baselines, "layers", lambda layers=layers: (layers, []))
        (case,) = compare.select([group], SETTINGS)
        work = case.build()
        if kind == "ours":
            with pytest.raises(cases.WrongResult, match="eager bad: gradient 0"):
                work.check()
            continue
        # A rival's deviation is said in its row, and does not end the run.
        remarks = work.check()
        assert {row.name for row in remarks} == {"bad"}
        result = report.summarise(case, work, {row: [1.0] for row in work.rows}, remarks)
        assert "(its own result: gradient 0 of shape" in report.table(result)


def test_a_wrong_result_is_named_and_the_other_cases_are_written(monkeypatch, capsys, tmp_path):
    layers = [
        baselines.Layer("identity", "identity", lambda coeff: baselines.Identity()),
        baselines.Layer("grl_ext", "ours", lambda coeff: baselines.Identity()),
    ]
    monkeypatch.setattr(baselines, "layers", lambda: (layers, []))
    json_path = tmp_path / "out.json"
    assert (
        compare.main(
            ["--quick", "--device", "cpu", "--cases", "tax/64", "memory", "bandwidth", "--json", str(json_path)]
        )
        == 1
    )
    assert "wrong result in tax/64: eager grl_ext: gradient 0" in capsys.readouterr().err
    assert [case["name"] for case in json.loads(json_path.read_text())["cases"]] == ["bandwidth/1M"]


def test_the_benchmark_waits_for_an_idle_machine_but_not_for_ever(monkeypatch, capsys):
    clock, cores = FakeClock(), compare.os.cpu_count()
    monkeypatch.setattr(compare.time, "monotonic", clock)
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: clock.step(seconds)())
    for idle_after, waited in ((0, 0), (20, 20), (1000, 60)):
        clock.now = 0.0
        monkeypatch.setattr(
            compare, "load", lambda idle_after=idle_after: 0.0 if clock.now >= idle_after else 2.0 * cores
        )
        compare.wait_until_idle(60)
        assert clock.now == waited
        assert ("waiting for at most 60 s" in capsys.readouterr().out) == (waited > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", ["heads", "grl_linear", "bandwidth"])
def test_rows_that_take_turns_over_buffers_all_give_the_right_result(monkeypatch, group, dtype):
    monkeypatch.setattr(heads, "turns", lambda features: 3)
    (case,) = compare.select([group], cases.Settings("cpu", dtype, quick=True))
    work = case.build()
    for _ in range(3):  # each check is a step of every row: the next buffer's
        assert work.check() == {}
    names = [row.name for row in work.rows]
    assert len(set(names)) == len(names)
    if group == "heads":
        assert {"pasted", "tuned", "heads(features)", heads.FUSED} <= set(names)
        assert heads.CHUNKED in names or not hasattr(torch.nn.functional, "linear_cross_entropy")


def test_a_row_that_cannot_run_is_left_out_with_the_reason(capsys):
    def make():
        raise RuntimeError("no such compiler")

    assert heads._if_it_runs("compiled pasted", make) == []
    assert "compiled pasted is left out: RuntimeError: no such compiler" in capsys.readouterr().out


def test_cuda_has_every_case_of_the_goals():
    shapes = {
        f"{n}x{d}_{k}+2"
        for n, d in ((128, 256), (1000, 1764), (4096, 1024), (65536, 1024), (65536, 2048))
        for k in (2, 10, 31)
    }
    found = {case.name: case for case in compare.select([], cases.Settings("cuda", torch.float32, quick=False))}
    assert {f"heads/{shape}" for shape in shapes} | {
        "bandwidth/64M",
        "bandwidth/256M",
        "grl_linear/4096x1024",
    } <= found.keys()
    assert found["heads/128x256_10+2"].clock == "wall" and found["heads/65536x1024_10+2"].clock == "device"


def test_buffers_in_turn_exceed_the_cache():
    for megabytes in (1, 7, 64, 256, 1024):
        count = bandwidth.turns(megabytes << 20)
        assert count >= 2 and (count - 1) * (megabytes << 20) >= bandwidth.KEPT_FROM_L2


def test_half_precision_passes_the_checks():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        (case,) = compare.select(["tax/64"], cases.Settings("cpu", dtype, quick=True))
        case.build().check()


def test_unknown_case_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="unknown case taxes; there are tax, memory, founding"):
        compare.main(["--quick", "--device", "cpu", "--cases", "taxes"])


def test_command_writes_table_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = subprocess.run(
        [
            sys.executable,
            BENCH / "compare.py",
            "--quick",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--cases",
            "tax/64",
            "memory",
        ]
        + ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert found.returncode == 0, found.stderr
    document = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    facts = document["environment"]
    assert facts["device"] == "cpu" and facts["dtype"] == "float32" and facts["threads"] == 1
    assert facts["torch"] == torch.__version__ and isinstance(facts["grl_ext"]["compiled"], bool)
    assert [case["name"] for case in document["cases"]] == ["tax/64", "memory/1M"]
    for case in document["cases"]:
        rows = {row["name"]: row for row in case["rows"]}
        assert {"identity", "pasted", "tuned", "grl_ext"} <= rows.keys()
        for row in rows.values():
            spread = row["total"]
            assert spread["p5"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["p95"]
            assert spread["n"] == rows["identity"]["total"]["n"]
        for name in rows:
            assert name in found.stdout
    # One float32 buffer; a number that an operation wraps in a tensor weighs some bytes more.
    assert rows["pasted"]["cost"]["median"] == pytest.approx(2**20 * 4, rel=1e-3)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_both_pictures_are_drawn_from_the_committed_run(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    documents = [json.loads(file.read_text()) for file in sorted((BENCH / "results").glob("cpu-avx*-float32.json"))]
    assert [document["environment"]["grl_ext"]["cpu_isa"] for document in documents] == ["avx2", "avx512"]
    empty = {**documents[0], "cases": []}
    for drawn, given, nothing in (
        (plot.draw, documents[0], empty),
        (plot.draw_heads, documents, [documents[0], empty]),
    ):
        drawn(given, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(SystemExit, match="nothing to draw"):
            drawn(nothing, tmp_path / "out.png")
    fewer = {**documents[1], "cases": documents[1]["cases"][::-1]}
    with pytest.raises(SystemExit, match="do not have the same cases and rows"):
        plot.draw_heads([documents[0], fewer], tmp_path / "out.png")
    elsewhere = {**documents[1], "environment": {**documents[1]["environment"], "threads": 1}}
    with pytest.raises(SystemExit, match="do not have the same device, dtype, threads and torch"):
        plot.draw_heads([documents[0], elsewhere], tmp_path / "out.png")
    with pytest.raises(SystemExit, match="at most two documents"):
        plot.draw_heads([*documents, documents[0]], tmp_path / "out.png")


def test_pairs_hold_what_their_label_says():
    digits = torch.tensor([0, 0, 3, 7])
    images = torch.tensor([100.0, 100.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 28, 28)
    pairs, labels = founding.digit_pairs(images, digits, 50, torch.Generator().manual_seed(0))
    assert pairs.shape == (50, 1, 28, 28) and 0 < labels.sum() < 50
    assert torch.equal(pairs[:, 0, 0, 0], torch.where(labels == 1, 101.0, 2.0))
    features, prediction, adversarial = founding.MnistNN2(baselines.Identity())(pairs[:2])
    assert features.shape == (2, 1764) and prediction.shape == adversarial.shape == (2, 2)
    assert math.isfinite(sum(founding.losses(founding.MnistNN2(baselines.Identity()), pairs, labels)).item())


def test_the_memory_of_conditioning_is_what_the_recipe_says():
    recipe = (BENCH.parent / "docs" / "recipes.md").read_text()
    outer, without = (
        float(number)
        for number in re.search(
            r"hold\s+([\d.]+)\s+MB\s+over\s+the\s+outer\s+product\s+and\s+([\d.]+)\s+MB", recipe
        ).groups()
    )
    found = conditioning.peaks(rows=64, features=2048, classes=65, domains=2)
    # Tensors are counted exactly; another version of torch may hold a small one more.
    assert found["outer_product"] / 1e6 == pytest.approx(outer, rel=0.05)
    assert found["contraction"] / 1e6 == pytest.approx(without, rel=0.05)


def test_the_sweep_draws_networks_of_every_kind_and_checks_what_they_give(monkeypatch):
    draw = random.Random(0)
    networks = [sweep.drawn(draw, torch.float32) for _ in range(200)]
    heads = [sizes for network in networks for sizes in (*network.predictors, *network.adversaries)]
    assert {len(sizes) for sizes in heads} == {1, 2, 3}
    assert min(sizes[-1] for sizes in heads) == 1
    assert max(sizes[-1] for sizes in heads) > 1000
    assert all(network.multiply_adds <= sweep.LARGEST for network in networks)

    for dtype in sweep.DTYPES.values():
        sweep.Problem(sweep.Network(32, 8, ((3,), (1,)), ((16, 2),), dtype)).check()
    wrong = sweep.Problem(sweep.Network(32, 8, (), ((2,),), torch.float32))
    wrong.heads.lambda_ = 2 * cases.COEFF
    with pytest.raises(cases.WrongResult, match=re.escape("float32 32x8 [] reversed [2]: gradient 0")):
        wrong.check()


def test_the_sweep_names_what_is_slower_beyond_the_noise(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(sweep, "wall_timer", lambda: measure.wall_timer(clock))

    class Fake:
        def __init__(self, ours: float) -> None:
            self.ours = ours

        def fused(self):
            return clock.step(self.ours)

        def layered(self):
            return clock.step(1e-2)

    for ours, above in ((0.8e-2, False), (1.2e-2, True)):
        spread, found = sweep.ratio(Fake(ours), seconds=0.1)
        assert spread.median == pytest.approx(ours / 1e-2)
        assert found == above
