"""Excess returns without the market: features that predict a stock's next excess return and do not know what the market
did.

A stock moves with the market, by its beta, and beyond it: the excess return, a small part of which can be predicted.
The encoder sees the last days of the stock and of the market; a predictor reads the stock's next excess return from its
features, an adversary behind the reversal reads the market's return of the day. Judged on later dates: does the
prediction still rank the stocks, and how much of the market does a fresh linear probe find in the features? Beside them
stand two forecasts without a network: a ridge regression on the same windows, and the rule that yesterday's losers will
win.
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
BASELINES = ("ridge", "yesterday's losers")
WINDOW = 10  # days that the encoder sees
BETA_DAYS = 250  # days before a return that its beta is estimated on
TRAINING_SHARE = 0.7
FEATURES = 16
# Daily returns have fat tails (kurtosis near 30 for large stocks): a few days would decide a squared error. Inputs and
# targets are standard scores within +-3. Raw scores and ranks did worse on the dates before the test (`--until 0.7`).
CLIP = 3.0


def generated_returns(dates: int, stocks: int, seed: int) -> Tensor:
    """Daily returns (dates, stocks) of a factor model: beta times a market with calm and wild regimes, and an excess
    part.

    Today's excess return is partly the reversal of the last three days' (what can be predicted), the rest is noise.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = 0.5 + torch.rand(stocks, generator=generator)
    # A regime lasts 50 days on average; the wild one has three times the volatility and falls instead of rising.
    wild = (torch.rand(dates, generator=generator) < 1 / 50).cumsum(0) % 2 == 1
    market = torch.randn(dates, generator=generator) * torch.where(wild, 0.021, 0.007) + torch.where(
        wild, -0.001, 0.001
    )
    excess = 0.01 * torch.randn(dates, stocks, generator=generator)
    for day in range(3, dates):
        excess[day] -= 0.12 * excess[day - 3 : day].sum(0)
    return market[:, None] * beta + excess


def load_returns(args: Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Daily returns of the stocks (dates, stocks) and of the market (dates,), which without an index is the mean of the
    stocks."""
    if args.csv is None:
        returns = generated_returns(args.dates, args.stocks, seed)
        return returns, returns.mean(1)
    prices = data.read_prices(args.csv)
    returns = prices.returns()
    return returns, data.read_index(args.index, prices.dates) if args.index else returns.mean(1)


@dataclass(frozen=True)
class Samples:
    """One row for each date and stock, in this order; all are scaled by their standard deviation on the training
    dates."""

    windows: Tensor  # (dates, stocks, 2 WINDOW): the stock's last days, the market's last days; clipped
    market: Tensor  # (dates, stocks): the market's return on the window's last day
    excess: Tensor  # (dates, stocks): the stock's excess return on the day after

    def __getitem__(self, dates: Tensor | slice) -> "Samples":
        return Samples(self.windows[dates], self.market[dates], self.excess[dates])

    def to(self, device: str) -> "Samples":
        return Samples(*(tensor.to(device) for tensor in vars(self).values()))


def rolling_betas(returns: Tensor, market: Tensor) -> Tensor:
    """(days - BETA_DAYS, stocks): the beta for day BETA_DAYS + i, from the BETA_DAYS days before it."""

    def means(daily: Tensor) -> Tensor:
        sums = F.pad(daily.double().cumsum(0), (0, 0, 1, 0))
        return (sums[BETA_DAYS:] - sums[:-BETA_DAYS])[:-1] / BETA_DAYS  # the last window has no day after

    market = market[:, None]
    covariance = means(returns * market) - means(returns) * means(market)
    return (covariance / (means(market * market) - means(market) ** 2)).to(returns.dtype)


def samples(returns: Tensor, market: Tensor) -> tuple[Samples, Samples]:
    """The earlier dates to learn from, the later to judge by; no day serves both."""
    if len(returns) < 3 * BETA_DAYS:
        raise data.DataError(f"{len(returns)} days of returns are too few: at least {3 * BETA_DAYS} are needed")
    split = int(len(returns) * TRAINING_SHARE)
    excess = returns[BETA_DAYS:] - rolling_betas(returns, market) * market[BETA_DAYS:, None]  # from day BETA_DAYS on
    excess = excess / excess[: split - BETA_DAYS].std()
    market = (market / market[:split].std())[:, None].expand_as(returns)
    days = torch.stack([returns / returns[:split].std(), market], -1).clamp(-CLIP, CLIP)
    # The first window ends on the last day of the first beta; the last one ends a day before the data does.
    windows = days.unfold(0, WINDOW, 1)[BETA_DAYS - WINDOW : -1].flatten(2)
    every = Samples(windows, market[BETA_DAYS - 1 : -1], excess)
    # The training ends where its last target lies; the test's first window begins right after.
    edge = split - BETA_DAYS
    return every[:edge], every[edge + WINDOW :]


class Network(nn.Module):
    """Windows -> features -> excess return and, behind the reversal, the market's return."""

    def __init__(self, lambda_: float) -> None:
        super().__init__()
        # A linear path, because on real prices little more than that is there to be found, and a small network beside
        # it.
        self.linear = nn.Linear(2 * WINDOW, FEATURES, bias=False)
        self.hidden = nn.Sequential(nn.Linear(2 * WINDOW, 32), nn.ReLU(), nn.Linear(32, FEATURES, bias=False))
        nn.init.zeros_(self.hidden[-1].weight)
        # Features of fixed size: the encoder may hide the market, not outgrow the adversary.
        self.scaled = nn.BatchNorm1d(FEATURES, affine=False)
        losses = {"excess": "mse", "market": "mse"}
        self.heads = grl_ext.AdversarialHeads(FEATURES, {"excess": 1}, {"market": 1}, lambda_=lambda_, losses=losses)

    def features(self, windows: Tensor) -> Tensor:
        """(dates, stocks, 2 WINDOW) -> (dates, stocks, FEATURES)"""
        rows = windows.flatten(0, 1)
        return self.scaled(self.linear(rows) + self.hidden(rows)).unflatten(0, windows.shape[:2])

    def loss(self, sample: Samples) -> Tensor:
        targets = {"excess": sample.excess.clamp(-CLIP, CLIP), "market": sample.market.clamp(-CLIP, CLIP)}
        return self.heads(self.features(sample.windows), targets).loss

    def parameter_groups(self, lr: float, hidden_rate: float) -> list[dict]:
        """Three learning rates. `README.md` beside this file tells how they were chosen."""
        return [
            {"params": [*self.linear.parameters(), *self.heads.predictors.parameters()], "lr": lr},
            # At the full rate it learns the training dates' noise.
            {"params": self.hidden.parameters(), "lr": hidden_rate * lr},
            # An adversary that lags behind chases the features around instead of emptying them: it alone learns faster.
            {"params": self.heads.adversaries.parameters(), "lr": 30 * lr},
        ]


def train(lambda_: float, seed: int, sample: Samples, args: Namespace, progress: tqdm) -> Network:
    torch.manual_seed(seed)
    network = Network(lambda_).to(args.device)
    # Little momentum, as is usual where two networks play against each other.
    optimizer = torch.optim.Adam(network.parameter_groups(args.lr, args.hidden_rate), betas=(0.5, 0.999))
    rate = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, args.steps
    )  # to 0: the noise is far larger than what can be learned
    # The control without reversal has nothing to schedule.
    lambdas = grl_ext.LambdaScheduler(network, grl_ext.schedules.linear(0.0, 1.0), args.steps) if lambda_ else None
    for _ in range(args.steps):
        # Whole dates: the market's return is one number a date.
        dates = torch.randint(len(sample.windows), (args.dates_per_batch,))
        optimizer.zero_grad()
        network.loss(sample[dates]).backward()
        optimizer.step()
        rate.step()
        if lambdas:
            lambdas.step()
        progress.update()
    return network.eval()


def rank_correlation(found: Tensor, expected: Tensor) -> Tensor:
    """Spearman's, across the stocks of each date: (dates, stocks) twice -> (dates,)."""
    ranks = [values.argsort(1).argsort(1).double() for values in (found, expected)]
    return F.cosine_similarity(*(rank - rank.mean(1, keepdim=True) for rank in ranks), dim=1)


def t_statistic(daily: Tensor) -> float:
    """Of the mean of daily values, which are taken as independent."""
    return (daily.mean() / daily.std().clamp_min(1e-30) * len(daily) ** 0.5).item()  # 0 where all are 0


def ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """Weights of a ridge regression of y (N,) on x (N, D) and a constant, the last weight."""
    x, y = with_one(x), y.double()
    return torch.linalg.solve(
        x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ y
    )


def with_one(x: Tensor) -> Tensor:
    return F.pad(x.double(), (0, 1), value=1.0)


def probe_r2(train_features: Tensor, train_target: Tensor, features: Tensor, target: Tensor) -> float:
    """How much of the target's variance a linear regression, fitted on the training dates, explains on the others."""
    weights = ridge(train_features, train_target, 1e-6)  # nearly none: features may depend on each other
    residual = target.double() - with_one(features) @ weights
    return (1 - residual.var() / target.double().var()).item()


@torch.no_grad()
def judge(network: Network, train_sample: Samples, test_sample: Samples) -> tuple[float, Tensor]:
    """On the later dates: the probe's R^2 of the market, and the daily rank correlations."""
    features, test_features = network.features(train_sample.windows), network.features(test_sample.windows)
    daily = rank_correlation(network.heads.predictors["excess"](test_features).squeeze(-1), test_sample.excess)
    r2 = probe_r2(
        features.flatten(0, 1), train_sample.market.flatten(), test_features.flatten(0, 1), test_sample.market.flatten()
    )
    return r2, daily.cpu()


def baselines(train_sample: Samples, test_sample: Samples) -> dict[str, Tensor]:
    """Daily rank correlations on the later dates of what needs no network."""
    targets = train_sample.excess.clamp(-CLIP, CLIP).flatten()
    forecast = with_one(test_sample.windows) @ ridge(train_sample.windows.flatten(0, 1), targets, 0.1)
    last = test_sample.windows[..., WINDOW - 1]
    return {
        "ridge": rank_correlation(forecast, test_sample.excess).cpu(),
        "yesterday's losers": rank_correlation(-last, test_sample.excess).cpu(),
    }


def plot(results: dict, daily: dict[str, list[Tensor]]):
    figure, axes = experiment.plt.subplots(1, 3, figsize=(14, 3.9), layout="constrained", width_ratios=[0.7, 1.1, 1.4])
    colours = dict(zip((*METHODS, *BASELINES), ("grey", "blue", "green", "pink"), strict=True))
    panels = {
        "market_r2": (METHODS, "market's return in the features:\nlinear probe's R²"),
        "rank_correlation": ((*METHODS, *BASELINES), "next excess return:\nrank correlation, and its t over the dates"),
    }
    for axis, (measure, (names, title)) in zip(axes, panels.items(), strict=False):
        found = [results[name][measure] for name in names]
        ticks = [name.replace(" ", "\n", 1) for name in names]
        axis.bar(
            ticks,
            [f["mean"] for f in found],
            color=[experiment.COLOURS[colours[name]] for name in names],
            alpha=0.5,
            width=0.6,
        )
        for i, f in enumerate(found):
            axis.scatter(
                [i] * len(f["values"]), f["values"], s=14, color="black", zorder=3, label="one seed" if i == 0 else None
            )
        axis.set(title=title)
        axis.margins(y=0.12)
        axis.axhline(0, color="black", linewidth=0.8)
    for i, name in enumerate(colours):
        axes[1].annotate(f"t {results[name]['t']:.1f}", (i, 0), (0, 4), textcoords="offset points", ha="center")
    axes[0].legend()
    for name, tint in colours.items():
        sums = [runs.cumsum(0).tolist() for runs in daily[name]]
        # The two networks' lines lie on each other, and on generated returns on the ridge regression's too.
        experiment.curve(
            axes[2],
            range(len(sums[0])),
            sums,
            name,
            tint,
            "--" if name == "with reversal" else "-",
            circles=name == "without reversal",
        )
    axes[2].set(title="daily rank correlation, summed over the later dates", xlabel="trading day")
    axes[2].legend(loc="upper left")
    return figure


def verdict(results: dict, fixed_data: bool) -> str:
    rows = [
        f"{name}: probe's R^2 of the market {experiment.shown(results[name]['market_r2'])}, "
        f"rank correlation {experiment.shown(results[name]['rank_correlation'], 4)} "
        f"(t over dates {results[name]['t']:.1f})"
        for name in METHODS
    ]
    rows += [
        f"{name}: {results[name]['rank_correlation']['mean']:.4f} (t {results[name]['t']:.1f})" for name in BASELINES
    ]
    cost = results["with minus without reversal"]
    rows.append(f"with minus without reversal: {cost['rank_correlation']['mean']:+.4f} (t {cost['t']:.1f})")
    varied = (
        "initial weights and batches on the same prices"
        if fixed_data
        else "generated returns, initial weights and batches"
    )
    return f"finding: {'; '.join(rows)}; ± is the spread over seeds of {varied}"


def main(arguments: list[str] | None = None) -> dict:
    options = experiment.parser("market", __doc__.splitlines()[0], seeds=5)
    options.add_argument(
        "--csv",
        type=Path,
        help="prices (columns date, ticker, close; or a date and one column a ticker; gz or not), instead of generated "
        "returns",
    )
    options.add_argument(
        "--index",
        type=Path,
        help="the market's own series for --csv (a date and one column), instead of the stocks' mean",
    )
    options.add_argument(
        "--until",
        type=float,
        default=1.0,
        help="the share of the dates to use; settings are chosen with 0.7 or less, so that the test dates stay unseen",
    )
    options.add_argument("--dates", type=int, default=2000, help="generated trading days")
    options.add_argument("--stocks", type=int, default=50, help="generated stocks")
    options.add_argument("--steps", type=int, default=3000)
    options.add_argument("--dates-per-batch", type=int, default=64)
    options.add_argument(
        "--lr", type=float, default=1e-3, help="of Adam at the start, falling to 0; thirty times that for the adversary"
    )
    options.add_argument(
        "--hidden-rate", type=float, default=0.1, help="times the learning rate, for the encoder's hidden part"
    )
    options.add_argument(
        "--lambda", dest="lambda_", type=float, default=1.0, help="where lambda rises to, in a straight line"
    )
    args = options.parse_args(arguments)
    if args.index and not args.csv:
        options.error("--index needs --csv: the market's own series goes with the stocks' prices")
    r2: dict[str, list[float]] = {method: [] for method in METHODS}
    daily: dict[str, list[Tensor]] = {name: [] for name in (*METHODS, *BASELINES)}
    with tqdm(total=2 * args.seeds * args.steps, unit="step") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            returns, market = load_returns(args, seed)
            days = int(len(returns) * args.until)
            returns, market = returns[:days], market[:days]
            train_sample, test_sample = (part.to(args.device) for part in samples(returns, market))
            for name, correlations in baselines(train_sample, test_sample).items():
                daily[name].append(correlations)
            for method, lambda_ in zip(METHODS, (0.0, args.lambda_), strict=True):
                progress.set_description(f"{method}, seed {seed}")
                found, correlations = judge(
                    train(lambda_, seed, train_sample, args, progress), train_sample, test_sample
                )
                r2[method].append(found)
                daily[method].append(correlations)
    # The difference day by day: what the two share on a date, luck above all, is not in it.
    daily["with minus without reversal"] = [b - a for a, b in zip(*(daily[method] for method in METHODS), strict=True)]
    results = {
        name: {
            "rank_correlation": experiment.spread([correlations.mean().item() for correlations in runs]),
            "t": t_statistic(torch.stack(runs).mean(0)),
        }
        for name, runs in daily.items()
    }
    for method in METHODS:
        results[method]["market_r2"] = experiment.spread(r2[method])
    results["dates"] = {"training": len(train_sample.windows), "test": len(test_sample.windows)}
    return experiment.finish(args, results, plot(results, daily), verdict(results, args.csv is not None))


if __name__ == "__main__":
    main()
