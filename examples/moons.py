"""Inter-twining moons: a class boundary learned on one pair of moons, used on the same moons rotated by 35 degrees.

The source moons have labels, the rotated target moons have none. A plain network fits the source and fails where the
target moons have turned away. The domain-adversarial network (Ganin et al., JMLR 2016, section 5.1) learns the same
labels from features in which an adversary cannot tell the domains apart, so that its boundary turns with the moons.
"""

import math
from argparse import Namespace

import torch
from common import experiment
from torch import Tensor, nn
from tqdm import tqdm

import grl_ext

NO_LABEL = -100
HIDDEN = 15


def moons(n: int, seed: int, degrees: float) -> tuple[Tensor, Tensor]:
    """n points (n, 2) of two centred half circles, rotated, and the moon (n,) that each belongs to."""
    from sklearn.datasets import make_moons

    points, labels = (torch.from_numpy(array) for array in make_moons(n, noise=0.05, random_state=seed))
    points = 2 * (points - points.mean(0)).float()
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return points @ torch.tensor([[cosine, sine], [-sine, cosine]]), labels


class Network(nn.Module):
    """15 sigmoid units; on them, in one layer, the class and the adversary that guesses the domain (one logit each)."""

    def __init__(self, lambda_: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(2, HIDDEN), nn.Sigmoid())
        self.heads = grl_ext.AdversarialHeads(
            HIDDEN, predictors={"moon": 1}, adversaries={"domain": 1}, lambda_=lambda_
        )

    def loss(self, points: Tensor, moon: Tensor, domain: Tensor) -> Tensor:
        return self.heads(self.hidden(points), {"moon": moon, "domain": domain}, ignore_index=NO_LABEL).loss

    @torch.no_grad()
    def logits(self, points: Tensor) -> dict[str, Tensor]:
        return {name: logit.squeeze(1) for name, logit in self.heads(self.hidden(points)).items()}


def batch(source: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All points, their moon (unknown for the target) and their domain (0 source, 1 target)."""
    points = torch.cat([source, target])
    moon = torch.cat([labels, torch.full((len(target),), NO_LABEL, device=labels.device)])
    domain = torch.arange(2, device=labels.device).repeat_interleave(
        torch.tensor([len(source), len(target)], device=labels.device)
    )
    return points, moon, domain


def train(lambda_: float, seed: int, data: tuple[Tensor, Tensor, Tensor], args: Namespace, progress: tqdm) -> Network:
    torch.manual_seed(seed)
    network = Network(lambda_).to(args.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9)
    for _ in range(args.steps):
        optimizer.zero_grad()
        network.loss(*data).backward()
        optimizer.step()
        progress.update()
    return network


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return ((logits > 0).long() == labels).float().mean().item()


def plot(shown: dict[str, tuple[Network, dict[str, dict]]], source: Tensor, labels: Tensor, target: Tensor):
    """Above the class boundary, below the domain boundary; left the plain network, right the adversarial one."""
    figure, axes = experiment.plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
    points = torch.cat([source, target])
    extent = [float(v) for pair in zip(points.amin(0) - 0.4, points.amax(0) + 0.4, strict=True) for v in pair]
    x, y = (torch.linspace(extent[i], extent[i + 1], 200) for i in (0, 2))
    grid = torch.cartesian_prod(x, y)
    colour = experiment.COLOURS
    for column, (title, (network, found)) in enumerate(shown.items()):
        logits = network.cpu().logits(grid)
        for row, (head, tints) in enumerate({"moon": ("pink", "green"), "domain": ("blue", "orange")}.items()):
            axis = axes[row, column]
            surface = logits[head].view(200, 200).T
            axis.contourf(x, y, surface, levels=[-1e9, 0, 1e9], colors=[colour[tint] for tint in tints], alpha=0.15)
            axis.contour(x, y, surface, levels=[0], colors="black", linewidths=1.2)
            if head == "moon":
                for moon, tint in enumerate(tints):
                    axis.scatter(*source[labels == moon].T, s=14, color=colour[tint], label=f"source, moon {moon + 1}")
                axis.scatter(*target.T, s=10, color="black", marker="x", linewidths=0.7, label="target, no label")
                axis.set_title(f"{title}: which moon\ntarget accuracy {experiment.shown(found['target_accuracy'])}")
            else:
                for points, tint, name in ((source, "blue", "source"), (target, "orange", "target")):
                    axis.scatter(*points.T, s=10, color=colour[tint], label=name)
                axis.set_title(
                    f"{title}: which domain\nadversary's accuracy {experiment.shown(found['domain_accuracy'])}"
                )
    seeds = len(found["target_accuracy"]["values"])
    of = f"mean ± standard deviation of {seeds} seeds, and" if seeds > 1 else "one seed:"
    figure.suptitle(f"{len(source)} points in each domain; {of} the boundaries of the last", fontsize=10)
    for row in axes:
        row[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main(arguments: list[str] | None = None) -> dict:
    options = experiment.parser("moons", __doc__.splitlines()[0], seeds=10)
    options.add_argument("--points", type=int, default=300, help="in each domain; the paper has as many")
    options.add_argument("--lambda", dest="lambda_", type=float, default=6.0, help="of the adversary, as in the paper")
    options.add_argument("--steps", type=int, default=2500, help="of gradient descent on all points")
    options.add_argument("--lr", type=float, default=0.1, help="with momentum 0.9")
    args = options.parse_args(arguments)
    found = {
        title: {"source_accuracy": [], "target_accuracy": [], "domain_accuracy": []} for title in ("plain", "DANN")
    }
    networks: dict[str, list[Network]] = {"plain": [], "DANN": []}
    with tqdm(total=2 * args.seeds * args.steps, unit="step") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            # Every seed has its own moons; the target is judged on fresh points.
            source, labels = moons(args.points, 3 * seed, 0)
            target, _ = moons(args.points, 3 * seed + 1, 35)
            fresh, fresh_labels = moons(2000, 3 * seed + 2, 35)
            data = tuple(tensor.to(args.device) for tensor in batch(source, labels, target))
            for title, lambda_ in (("plain", 0.0), ("DANN", args.lambda_)):
                progress.set_description(f"{title}, seed {seed}")
                network = train(lambda_, seed, data, args, progress).cpu()
                networks[title].append(network)
                found[title]["source_accuracy"].append(accuracy(network.logits(source)["moon"], labels))
                found[title]["target_accuracy"].append(accuracy(network.logits(fresh)["moon"], fresh_labels))
                found[title]["domain_accuracy"].append(accuracy(network.logits(data[0].cpu())["domain"], data[2].cpu()))
    results = {title: {k: experiment.spread(v) for k, v in by.items()} for title, by in found.items()}
    # The last seed's networks, under the mean of all.
    figure = plot({title: (networks[title][-1], results[title]) for title in results}, source, labels, target)
    finding = f"finding: target accuracy with {args.points} points: " + ", ".join(
        f"{title} {experiment.shown(by['target_accuracy'])}" for title, by in results.items()
    )
    return experiment.finish(args, results, figure, finding)


if __name__ == "__main__":
    main()
