"""Does a pair of digits contain a zero? The founding experiment: a predictor, and an adversary that learns the
complement.

Two digits are added pixel by pixel. The predictor says whether one of them is a zero; behind the gradient reversal
layer, the adversary learns to say the opposite. The published claim is that the reversed branch makes the predictor
learn faster and better. The same network is trained as published (stock layers and `GRL`) and in its fused form
(`AdversarialHeads`), with the reversal on and off, and without it at twice and half the learning rate; and at every
point we ask whether the reversed gradient points where the predictor's own does. `--published` is the published setting
itself, on MNIST.
"""

import copy
import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import data, experiment
from common.founding import MnistNN2, losses
from torch import Tensor, nn
from tqdm import tqdm

import grl_ext


class FusedNN2(nn.Module):
    """The same network with both heads and the reversal in one layer, which reads the features once."""

    def __init__(self, network: MnistNN2, lambda_: float) -> None:
        super().__init__()
        self.extractor = network.extractor
        self.heads = grl_ext.AdversarialHeads(
            network.out.in_features, {"zero": network.out}, {"complement": network.advout}, lambda_=lambda_
        )

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.heads(self.extractor(images), {"zero": labels, "complement": 1 - labels}).loss


@dataclass(frozen=True)
class Variant:
    title: str
    lambda_: float
    rate: float = 1.0  # times the learning rate
    fused: bool = False
    colour: str = "grey"
    style: str = "-"


VARIANTS = {
    "reversed": Variant("with reversal, published layers", 1.0, colour="orange"),
    "fused": Variant(
        "with reversal, fused heads (on the line with circles)", 1.0, fused=True, colour="blue", style=":"
    ),
    # Lambda 0 is the network without an adversary: nothing of it reaches the features. It still learns, and can be
    # watched.
    "plain": Variant("no reversal", 0.0, colour="green"),
    "double": Variant("no reversal, twice the rate", 0.0, rate=2.0, colour="pink", style="--"),
    "half": Variant("no reversal, half the rate", 0.0, rate=0.5, colour="grey", style="--"),
}


# The published setting: 2000 steps in all, at a rate so low that one run takes some eight minutes of one core.
PUBLISHED = {
    "pairs": 2000,
    "batch": 1000,
    "epochs": 1000,
    "every": 10,
    "lr": 0.001,
    "seeds": 3,
    "variants": ["reversed", "plain"],
}


@dataclass(frozen=True)
class Pairs:
    images: Tensor
    labels: Tensor


def build(variant: Variant, seed: int) -> tuple[nn.Module, MnistNN2, Callable[[Tensor, Tensor], Tensor]]:
    """What is trained, the published network (to look into) and the loss; the initial weights depend on the seed
    alone."""
    torch.manual_seed(seed)
    network = MnistNN2(grl_ext.GRL(variant.lambda_))
    if variant.fused:
        fused = FusedNN2(copy.deepcopy(network), variant.lambda_)
        return fused, network, fused.loss
    return network, network, lambda images, labels: sum(losses(network, images, labels))


Curves = dict[str, list[float]]  # by quantity, a value for every `--every` epochs


def train(variant: Variant, seed: int, pairs: Pairs, held_out: Pairs, args: Namespace, progress: tqdm) -> Curves:
    """One run: its curves on held-out pairs, and the accuracies on the training pairs."""
    trained, network, loss_of = build(variant, seed)
    trained.to(args.device), network.to(args.device)
    optimizer = torch.optim.SGD(trained.parameters(), lr=args.lr * variant.rate)
    curves: Curves = defaultdict(list)
    for epoch in range(1, args.epochs + 1):
        for images, labels in zip(pairs.images.split(args.batch), pairs.labels.split(args.batch), strict=True):
            optimizer.zero_grad()
            loss_of(images, labels).backward()
            optimizer.step()
            progress.update()
        if epoch % args.every == 0:
            published = published_form(trained, network)
            on_training = measure(published, pairs)
            found = measure(published, held_out) | {
                f"training_{name}": on_training[name] for name in ("accuracy", "adversary")
            }
            for name, value in found.items():
                curves[name].append(value)
    return dict(curves)


def saved_or_trained(name: str, seed: int, pairs: Pairs, held_out: Pairs, args: Namespace, progress: tqdm) -> Curves:
    """One run, kept in a file of the output folder. `--resume` takes a finished run from there, if it had the same
    settings."""
    file = args.out / "runs" / f"{name}-{seed}.json"
    settings = {option: getattr(args, option) for option in ("pairs", "batch", "epochs", "every", "lr")}
    settings["digits"] = "MNIST" if args.mnist else "scikit-learn"
    if args.resume and file.exists():
        saved = json.loads(file.read_text())
        if saved["settings"] == settings:
            progress.update(args.epochs * -(-args.pairs // args.batch))
            return saved["curves"]
    curves = train(VARIANTS[name], seed, pairs, held_out, args, progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": settings, "curves": curves}))
    return curves


def published_form(trained: nn.Module, network: MnistNN2) -> MnistNN2:
    """The network as published, with the weights of what is trained."""
    if isinstance(trained, FusedNN2):
        predictors, adversaries = trained.heads.predictors, trained.heads.adversaries
        network.extractor, network.out, network.advout = (
            trained.extractor,
            predictors["zero"],
            adversaries["complement"],
        )
    return network


@torch.no_grad()
def measure(network: MnistNN2, pairs: Pairs) -> dict[str, float]:
    """The loss, both accuracies against the label, so that an adversary who succeeds is below 0.5; and the gradients'
    agreement."""
    _, prediction, adversarial = network(pairs.images)
    labels = pairs.labels
    # What the features are told by each head, in closed form: the softmax's error times the weights; then the
    # reversal's sign.
    own = (prediction.softmax(1) - F.one_hot(labels, 2)) @ network.out.weight
    reversed_ = -(adversarial.softmax(1) - F.one_hot(1 - labels, 2)) @ network.advout.weight
    return {
        "loss": F.cross_entropy(prediction, labels).item(),
        "accuracy": (prediction.argmax(1) == labels).float().mean().item(),
        "adversary": (adversarial.argmax(1) == labels).float().mean().item(),
        "agreement": F.cosine_similarity(own.flatten(), reversed_.flatten(), dim=0).item(),
    }


def first_epoch_at(level: float, curve: list[float], every: int) -> float:
    """The first measured epoch with at least that accuracy; past the end if there is none."""
    return next((every * (i + 1) for i, value in enumerate(curve) if value >= level), every * (len(curve) + 1))


def summarise(curves: dict[str, list[Curves]], args: Namespace) -> dict:
    """By variant, over the seeds: when it reaches 85 and 90 %, where it ends, and how the two gradients agree."""

    def over_seeds(name: str, value: Callable[[Curves], float]) -> dict:
        return experiment.spread([value(run) for run in curves[name]])

    return {
        name: {
            "epochs_to_0.85": over_seeds(name, lambda run: first_epoch_at(0.85, run["accuracy"], args.every)),
            "epochs_to_0.90": over_seeds(name, lambda run: first_epoch_at(0.9, run["accuracy"], args.every)),
            "halfway_accuracy": over_seeds(name, lambda run: run["accuracy"][(len(run["accuracy"]) - 1) // 2]),
            "final_accuracy": over_seeds(name, lambda run: run["accuracy"][-1]),
            "final_training_accuracy": over_seeds(name, lambda run: run["training_accuracy"][-1]),
            "final_loss": over_seeds(name, lambda run: run["loss"][-1]),
            "first_agreement": over_seeds(name, lambda run: run["agreement"][0]),
            "final_agreement": over_seeds(name, lambda run: run["agreement"][-1]),
        }
        for name in curves
    }


def plot(curves: dict[str, list[Curves]], args: Namespace):
    figure, axes = experiment.plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    epochs = [args.every * (i + 1) for i in range(len(curves["plain"][0]["loss"]))]
    panels = {
        "accuracy": "predictor: accuracy on held-out pairs",
        "training_accuracy": "predictor: accuracy on the training pairs",
        "loss": "predictor: loss on held-out pairs",
        "training_adversary": "adversary: accuracy against the label\n"
        "on the training pairs (its target is the complement)",
        "agreement": "cosine of reversed and own gradient\nat the features",
    }
    *axes, last = axes.flat
    for axis, (quantity, title) in zip(axes, panels.items(), strict=True):
        for name in curves:
            variant = VARIANTS[name]
            hidden = name == "reversed" and "fused" in curves  # the fused heads' line lies on it
            runs = [run[quantity] for run in curves[name]]
            experiment.curve(axis, epochs, runs, variant.title, variant.colour, variant.style, circles=hidden)
        axis.set(title=title, xlabel="epoch")
    for axis in axes[:2]:
        axis.set_ylim(0.5, 1.0)
    axes[3].set_ylim(0.0, 0.6)
    axes[4].axhline(0, color="black", linewidth=0.8)
    seeds = len(curves["plain"])
    title = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    if "fused" in curves:
        for quantity, colour, label in (("accuracy", "blue", "accuracy"), ("loss", "pink", "loss")):
            pairs = zip(curves["fused"], curves["reversed"], strict=True)
            runs = [[a - b for a, b in zip(fused[quantity], own[quantity], strict=True)] for fused, own in pairs]
            experiment.curve(last, epochs, runs, f"{label} on held-out pairs", colour)
        last.set(title="the two lines that lie on each other:\nfused heads minus published layers", xlabel="epoch")
        last.axhline(0, color="black", linewidth=0.8)
        last.legend()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
    else:
        last.axis("off")
        last.legend(*axes[0].get_legend_handles_labels(), loc="center", title=title)
    return figure


def largest_differences(runs: list[Curves], others: list[Curves]) -> dict[str, float]:
    """By quantity, over all seeds and epochs."""
    return {
        quantity: max(
            abs(a - b)
            for run, other in zip(runs, others, strict=True)
            for a, b in zip(run[quantity], other[quantity], strict=True)
        )
        for quantity in runs[0]
    }


def verdict(results: dict, args: Namespace) -> str:
    """With and without reversal, and at other rates where they were run: speed, end, and how the two gradients
    agree."""
    with_, without = results["reversed"], results["plain"]
    titles = {
        "reversed": "with reversal",
        "plain": "without",
        "double": "without at twice the rate",
        "half": "without at half the rate",
    }
    titles = {name: title for name, title in titles.items() if name in results}

    def each(quantity: str, digits: int = 3) -> str:
        return ", ".join(
            f"{experiment.shown(results[name][quantity], digits)} {title}" for name, title in titles.items()
        )

    parts = [
        f"epochs to 90 % {each('epochs_to_0.90', 0)} (past {args.epochs}: not reached)",
        f"final held-out accuracy {each('final_accuracy')}",
        f"on the training pairs {each('final_training_accuracy')}",
        f"final held-out loss {each('final_loss')}",
        f"without reversal after half of the epochs {experiment.shown(without['halfway_accuracy'])}",
        "the reversed gradient's cosine with the predictor's own goes from "
        f"{with_['first_agreement']['mean']:+.2f} to {with_['final_agreement']['mean']:+.2f}",
    ]
    if "published_to_fused" in results:
        furthest = results["published_to_fused"]
        parts.append(
            f"published and fused network differ by at most {furthest['accuracy']:.3f} in accuracy, "
            f"{furthest['loss']:.1g} in loss"
        )
    return "finding: " + "; ".join(parts)


def main(arguments: list[str] | None = None) -> dict:
    options = experiment.parser("pair_digits", __doc__.splitlines()[0], seeds=5)
    options.add_argument(
        "--mnist", type=Path, help="folder with MNIST's IDX files (gz or not), instead of scikit-learn's digits"
    )
    options.add_argument(
        "--published", action="store_true", help="the published setting, on MNIST: other defaults for the options below"
    )
    options.add_argument("--pairs", type=int, default=200, help="training pairs")
    options.add_argument("--batch", type=int, default=100)
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument(
        "--every", type=int, default=4, help="epochs between measurements on the training pairs and 500 held-out pairs"
    )
    options.add_argument("--lr", type=float, default=0.03, help="of plain SGD")
    options.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="reversed and plain must be among them"
    )
    options.add_argument(
        "--resume", action="store_true", help="take finished runs with the same settings from the output folder"
    )
    options.add_argument(
        "--redraw", action="store_true", help="only draw the picture anew, from the output folder's metrics.json"
    )
    if options.parse_known_args(arguments)[0].published:
        options.set_defaults(**PUBLISHED)
    args = options.parse_args(arguments)
    if args.published and args.mnist is None:
        options.error("--published needs --mnist: the published setting is on MNIST")
    if not {"reversed", "plain"} <= set(args.variants):
        options.error("--variants needs reversed and plain, which the finding compares")
    if args.redraw:
        saved = json.loads((args.out / "metrics.json").read_text())
        args.every = saved["settings"]["every"]
        experiment.save(plot(saved["results"]["curves"], args), args.out)
        return saved
    digits = data.load_digits(args.mnist, 28)
    curves: dict[str, list[Curves]] = {name: [] for name in args.variants}
    steps = len(args.variants) * args.seeds * args.epochs * -(-args.pairs // args.batch)
    with tqdm(total=steps, unit="step") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            generator = torch.Generator().manual_seed(seed)
            drawn = data.digit_pairs(digits.train_images, digits.train_digits, args.pairs, generator)
            pairs = Pairs(*(tensor.to(args.device) for tensor in drawn))
            drawn = data.digit_pairs(digits.test_images, digits.test_digits, 500, generator)
            held_out = Pairs(*(tensor.to(args.device) for tensor in drawn))
            for name in args.variants:
                progress.set_description(f"{name}, seed {seed}")
                curves[name].append(saved_or_trained(name, seed, pairs, held_out, args, progress))
    results = summarise(curves, args)
    if "fused" in curves:
        results["published_to_fused"] = largest_differences(curves["reversed"], curves["fused"])
    return experiment.finish(args, {**results, "curves": curves}, plot(curves, args), verdict(results, args))


if __name__ == "__main__":
    main()
