"""The experiments, for a few steps each: that they run, learn, and that their fused, resumed and distributed forms are the same.

What they find takes their default settings: `make examples`.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import grl_ext

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # scripts, not part of the package

import dann_digits  # noqa: E402
import market  # noqa: E402
import moons  # noqa: E402
import pair_digits  # noqa: E402
from common import data, experiment  # noqa: E402

FEW = {
    "moons": (moons, ["--seeds", "1", "--points", "40", "--steps", "5"]),
    "pair_digits": (pair_digits, ["--seeds", "2", "--pairs", "20", "--batch", "10", "--epochs", "4", "--every", "2"]),
    "dann_digits": (dann_digits, ["--seeds", "1", "--crops", "1", "--steps", "3", "--batch", "16"]),
    "market": (market, ["--seeds", "2", "--dates", "150", "--stocks", "6", "--steps", "3", "--dates-per-batch", "4"]),
}


@pytest.mark.parametrize("name", FEW)
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


@pytest.mark.parametrize("name", FEW)
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


def quiet() -> tqdm:
    return tqdm(disable=True)


# --- they learn ------------------------------------------------------------------------------------------------------------


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


def test_market_learns_the_excess_return():
    args = experiment.parser("market", "", 1).parse_args([])
    args.lr, args.dates_per_batch = 1e-3, 16
    train_sample, test_sample = market.samples(market.generated_returns(400, 20, 0))
    assert train_sample.windows.shape == (400 * 7 // 10 - market.WINDOW, 20, 2 * market.WINDOW)
    networks = []
    for args.steps in (1, 150):
        networks.append(market.train(0.0, 0, train_sample, args, quiet()))
    before, after = (F.mse_loss(n.heads(n.encoder(train_sample.windows))["excess"].squeeze(-1), train_sample.excess).item() for n in networks)
    assert after < before
    measures, daily = market.judge(networks[1], train_sample, test_sample)
    assert daily.shape == test_sample.excess.shape[:1] and measures["market_r2"] <= 1


def test_the_markets_windows_end_before_what_they_predict():
    returns = market.generated_returns(200, 5, 0)
    train_sample, _ = market.samples(returns)
    split = 140
    index = returns.mean(1)
    day = 7  # a row of the samples: its window is the days 7 to 16, its target day 17
    last = day + market.WINDOW - 1
    torch.testing.assert_close(train_sample.windows[day, 2, : market.WINDOW], returns[day : last + 1, 2] / returns[:split].std())
    torch.testing.assert_close(train_sample.windows[day, 2, market.WINDOW :], index[day : last + 1] / index[:split].std())
    torch.testing.assert_close(train_sample.market[day, 2], index[last] / index[:split].std())
    centred = index[:split] - index[:split].mean()
    beta = (centred @ returns[:split, 2]) / (centred @ centred)
    excess = returns - market_part(returns, split)
    torch.testing.assert_close(train_sample.excess[day, 2], (returns[last + 1, 2] - beta * index[last + 1]) / excess[:split].std())


def market_part(returns: torch.Tensor, split: int) -> torch.Tensor:
    index = returns.mean(1, keepdim=True)
    centred = index[:split] - index[:split].mean()
    return index * ((centred * returns[:split]).sum(0) / (centred**2).sum())


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


# --- fused form and layer-by-layer form --------------------------------------------------------------------------------------


def pairs(n: int) -> pair_digits.Pairs:
    digits = data.load_digits(None, 28)
    return pair_digits.Pairs(*data.digit_pairs(digits.train_images, digits.train_digits, n, torch.Generator().manual_seed(0)))


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
    reversed_ = torch.autograd.grad(F.cross_entropy(network.advout(network.reversal(features)), 1 - batch.labels), features)[0]
    expected = F.cosine_similarity(own.flatten(), reversed_.flatten(), dim=0).item()
    assert pair_digits.measure(network, batch)["agreement"] == pytest.approx(expected, abs=1e-5)


class StockBranches(nn.Module):
    """dann_digits' fused first layer, of stock layers."""

    def __init__(self, fused: grl_ext.AdversarialHeads) -> None:
        super().__init__()
        (digit,), (domain,) = (heads.values() for heads in fused.to_linears())
        self.digit, self.domain, self.reversal = digit, domain, grl_ext.GRL(0.0)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"digit": self.digit(features), "domain": self.domain(self.reversal(features))}


def dann_training(method: str = "DANN", **changes) -> dann_digits.Training:
    args = experiment.parser("dann_digits", "", 1).parse_args([])
    settings = {"mnist": None, "photos": None, "crops": 1, "batch": 16, "steps": 6, "lr": 0.03, "gamma": 10.0, "lambda_": 1.0, "ddp": False}
    vars(args).update(settings | changes)
    return dann_digits.Training(method, 0, dann_digits.load_domains(args), args)


def test_dann_digits_fused_branches_train_like_stock_layers_step_by_step():
    fused, stock = dann_training(), dann_training()
    stock.network.branches = StockBranches(stock.network.branches)
    stock.optimizer = torch.optim.SGD(stock.network.parameters(), lr=0.03, momentum=0.9)
    stock.rate = torch.optim.lr_scheduler.LambdaLR(stock.optimizer, fused.rate.lr_lambdas)
    stock.lambdas = grl_ext.LambdaScheduler(stock.network, fused.lambdas.schedule, 6)
    for _ in range(6):
        for ours, theirs in zip(fused.step(), stock.step(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert fused.network.branches.lambda_.item() == stock.network.branches.reversal.lambda_.item()
    assert fused.network.branches.lambda_.item() > 0.99


def test_dann_digits_hides_the_labels_that_a_method_must_not_see():
    for method, labelled in (("source only", "source"), ("DANN", "source"), ("train on target", "target")):
        images, digits, domain = dann_training(method).batch()
        assert images.shape == (16, 3, 16, 16)
        seen = (digits != dann_digits.NO_LABEL).long()
        assert torch.equal(seen, domain if labelled == "source" else 1 - domain)


@pytest.mark.parametrize("method, last", [("source only", 0.0), ("DANN", 1.0)])
def test_dann_digits_raises_lambda_for_the_adversary_only(method, last):
    training = dann_training(method, lambda_=1.0, gamma=100.0)
    for _ in range(6):
        training.step()
    assert training.network.branches.lambda_.item() == pytest.approx(last)


# --- resumed, and distributed ------------------------------------------------------------------------------------------------


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
    few = ["--seeds", "1", "--crops", "1", "--steps", "4", "--batch", "16"]
    program = [str(EXAMPLES / "dann_digits.py"), *few]
    # On one thread a process, so that sums are added in the same order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, command in (("one", program), ("two", [*torchrun, *program, "--ddp"])):
        result = subprocess.run([sys.executable, *command, "--out", str(tmp_path / out)], env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    for method in ("source_only", "DANN", "train_on_target"):
        one, two = (torch.load(tmp_path / out / f"{method}-0.pt") for out in ("one", "two"))
        for name, value in one["network"].items():
            torch.testing.assert_close(two["network"][name], value, rtol=1e-3, atol=1e-5)
