"""Excess returns without the market: features that predict a stock's next excess return and do not know what the market did.

A stock moves with the market, by its beta, and beyond it: the excess return, a small part of which can be predicted. The encoder
sees the last days of the stock and of the market; a predictor reads the stock's next excess return from its features, an adversary
behind the reversal reads the market's return of the day. Judged on later dates: does the prediction still rank the stocks, and how
much of the market does a fresh linear probe find in the features?
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import data, experiment
from torch import Tensor, nn
from tqdm import tqdm

import grl_ext

METHODS = ("without reversal", "with reversal")
WINDOW = 10  # days that the encoder sees
FEATURES = 16


def generated_returns(dates: int, stocks: int, seed: int) -> Tensor:
    """Daily returns (dates, stocks) of a factor model: beta times a market with calm and wild regimes, and an excess part.

    Today's excess return is partly the reversal of the last three days' (what can be predicted), the rest is noise.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = 0.5 + torch.rand(stocks, generator=generator)
    # A regime lasts 50 days on average; the wild one has three times the volatility and falls instead of rising.
    wild = (torch.rand(dates, generator=generator) < 1 / 50).cumsum(0) % 2 == 1
    market = torch.randn(dates, generator=generator) * torch.where(wild, 0.021, 0.007) + torch.where(wild, -0.001, 0.001)
    excess = 0.01 * torch.randn(dates, stocks, generator=generator)
    for day in range(3, dates):
        excess[day] -= 0.12 * excess[day - 3 : day].sum(0)
    return market[:, None] * beta + excess


@dataclass(frozen=True)
class Samples:
    """One row for each date and stock, in this order; all three are scaled by their standard deviation on the training dates."""

    windows: Tensor  # (dates, stocks, 2 WINDOW): the stock's last days, the market's last days
    market: Tensor  # (dates, stocks): the market's return on the window's last day
    excess: Tensor  # (dates, stocks): the stock's excess return on the day after


def samples(returns: Tensor, share: float = 0.7) -> tuple[Samples, Samples]:
    """The earlier dates to learn from, the later to judge by. The market is the mean of all stocks, betas are the earlier dates'."""
    if len(returns) < 10 * WINDOW:
        raise data.DataError(f"{len(returns)} days of returns are too few: at least {10 * WINDOW} are needed")
    split = int(len(returns) * share)
    market = returns.mean(1, keepdim=True)
    centred = market[:split] - market[:split].mean()
    beta = (centred * returns[:split]).sum(0) / (centred**2).sum()
    excess = returns - beta * market
    days = torch.stack([returns / returns[:split].std(), (market / market[:split].std()).expand_as(returns)], -1)
    windows = days.unfold(0, WINDOW, 1)[:-1].flatten(2)  # the last window has no day after
    of_day = (market / market[:split].std()).expand_as(returns)[WINDOW - 1 : -1]
    after = (excess / excess[:split].std())[WINDOW:]
    # The training ends where its last target lies; the test's first window begins right after.
    edge = split - WINDOW
    train, test = slice(None, edge), slice(split, None)
    return Samples(windows[train], of_day[train], after[train]), Samples(windows[test], of_day[test], after[test])


class Network(nn.Module):
    """Windows -> features -> excess return and, behind the reversal, the market's return."""

    def __init__(self, lambda_: float) -> None:
        super().__init__()
        # LayerNorm keeps the features' size: the encoder may hide the market, not outgrow the adversary.
        self.encoder = nn.Sequential(
            nn.Linear(2 * WINDOW, 64), nn.ReLU(), nn.Linear(64, FEATURES), nn.LayerNorm(FEATURES, elementwise_affine=False)
        )
        self.heads = grl_ext.AdversarialHeads(FEATURES, predictors={"excess": 1}, adversaries={"market": 1}, lambda_=lambda_)

    def loss(self, windows: Tensor, market: Tensor, excess: Tensor) -> Tensor:
        found = self.heads(self.encoder(windows))
        return F.mse_loss(found["excess"].squeeze(-1), excess) + F.mse_loss(found["market"].squeeze(-1), market)


def train(lambda_: float, seed: int, sample: Samples, args: Namespace, progress: tqdm) -> Network:
    torch.manual_seed(seed)
    network = Network(lambda_).to(args.device)
    # An adversary that lags behind chases the features around instead of emptying them: it learns thirty times as fast, from many
    # dates at a time, and the optimizer keeps little momentum, as is usual where two networks play against each other.
    groups = [{"params": network.encoder.parameters(), "lr": args.lr}, {"params": network.heads.parameters(), "lr": 30 * args.lr}]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))
    lambdas = grl_ext.LambdaScheduler(network, grl_ext.schedules.linear(0.0, lambda_), args.steps)
    for _ in range(args.steps):
        # Whole dates: the market's return is one number a date.
        dates = torch.randint(len(sample.windows), (args.dates_per_batch,))
        optimizer.zero_grad()
        network.loss(sample.windows[dates], sample.market[dates], sample.excess[dates]).backward()
        optimizer.step()
        lambdas.step()
        progress.update()
    return network


def rank_correlation(found: Tensor, expected: Tensor) -> Tensor:
    """Spearman's, across the stocks of each date: (dates, stocks) twice -> (dates,)."""
    ranks = [values.argsort(1).argsort(1).double() for values in (found, expected)]
    return F.cosine_similarity(*(rank - rank.mean(1, keepdim=True) for rank in ranks), dim=1)


def probe_r2(train_features: Tensor, train_target: Tensor, features: Tensor, target: Tensor) -> float:
    """How much of the target's variance a linear regression, fitted on the training dates, explains on the others."""

    def with_one(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1).double()

    x, y = with_one(train_features), train_target.double()
    # A little ridge: LayerNorm makes the features' sum constant, and the normal equations singular.
    weights = torch.linalg.solve(x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ y)
    residual = target.double() - with_one(features) @ weights
    return (1 - residual.var() / target.double().var()).item()


@torch.no_grad()
def judge(network: Network, train_sample: Samples, test_sample: Samples) -> tuple[dict[str, float], Tensor]:
    """The measures on the later dates, and the daily rank correlations."""
    features, test_features = network.encoder(train_sample.windows), network.encoder(test_sample.windows)
    daily = rank_correlation(network.heads(test_features)["excess"].squeeze(-1), test_sample.excess)
    r2 = probe_r2(
        features.flatten(0, 1), train_sample.market.flatten(), test_features.flatten(0, 1), test_sample.market.flatten()
    )
    return {"rank_correlation": daily.mean().item(), "market_r2": r2}, daily.cpu()


def plot(results: dict, daily: dict[str, list[Tensor]]):
    figure, axes = experiment.plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained", width_ratios=[0.8, 0.8, 1.4])
    colours = dict(zip(METHODS, ("grey", "blue"), strict=True))
    titles = {"market_r2": "market's return in the features:\nlinear probe's R²", "rank_correlation": "excess return predicted:\nrank correlation"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=False):
        found = [results[method][measure] for method in METHODS]
        axis.bar(METHODS, [f["mean"] for f in found], color=[experiment.COLOURS[colours[m]] for m in METHODS], alpha=0.5, width=0.6)
        for i, f in enumerate(found):
            axis.scatter([i] * len(f["values"]), f["values"], s=14, color="black", zorder=3, label="one seed" if i == 0 else None)
        axis.set(title=title)
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].legend()
    for method in METHODS:
        sums = [runs.cumsum(0).tolist() for runs in daily[method]]
        experiment.curve(axes[2], range(len(sums[0])), sums, method, colours[method])
    axes[2].set(title="daily rank correlation, summed over the later dates", xlabel="trading day")
    axes[2].legend(loc="upper left")
    return figure


def main(arguments: list[str] | None = None) -> dict:
    options = experiment.parser("market", __doc__.splitlines()[0], seeds=5)
    options.add_argument("--csv", type=Path, help="prices (date, ticker, close), instead of generated returns")
    options.add_argument("--dates", type=int, default=2000, help="generated trading days")
    options.add_argument("--stocks", type=int, default=50, help="generated stocks")
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--dates-per-batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=1e-3, help="of Adam for the encoder; thirty times that for the heads")
    options.add_argument("--lambda", dest="lambda_", type=float, default=1.0, help="where lambda rises to, in a straight line")
    args = options.parse_args(arguments)
    found = {method: {"rank_correlation": [], "market_r2": []} for method in METHODS}
    daily: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    with tqdm(total=2 * args.seeds * args.steps, unit="step") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            returns = data.read_returns(args.csv) if args.csv else generated_returns(args.dates, args.stocks, seed)
            train_sample, test_sample = (
                Samples(*(tensor.to(args.device) for tensor in vars(part).values())) for part in samples(returns)
            )
            for method, lambda_ in zip(METHODS, (0.0, args.lambda_), strict=True):
                progress.set_description(f"{method}, seed {seed}")
                measures, correlations = judge(train(lambda_, seed, train_sample, args, progress), train_sample, test_sample)
                daily[method].append(correlations)
                for name, value in measures.items():
                    found[method][name].append(value)
    results = {method: {name: experiment.spread(values) for name, values in by.items()} for method, by in found.items()}
    finding = "finding: " + "; ".join(
        f"{method}: probe's R^2 of the market {experiment.shown(by['market_r2'])}, "
        f"rank correlation with excess returns {experiment.shown(by['rank_correlation'])}"
        for method, by in results.items()
    )
    return experiment.finish(args, results, plot(results, daily), finding)


if __name__ == "__main__":
    main()
