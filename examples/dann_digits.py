"""Domain adaptation: learn digits from clean images, read them in front of photographs, without a label there.

The source is clean digits; the target is the same kind of digits blended with photographs by absolute difference, the recipe of
MNIST-M. The domain-adversarial network (Ganin et al., JMLR 2016) learns digits from source labels alone, from features in which an
adversary cannot tell the domains apart. It stands between two networks of the same shape: one trained on the source only, one on
target labels that the others never see. The share of that gap it closes is the result.
Distributed: `torchrun --nproc-per-node 2 examples/dann_digits.py --ddp` gives the same run as one process.
"""

import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import data, experiment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import grl_ext

NO_LABEL = -100
METHODS = ("source only", "DANN", "train on target")


@dataclass(frozen=True)
class Domains:
    """Both domains, centred: images (N, 3, size, size), digits (N,). Target digits serve only as upper bound and as test."""

    source: Tensor
    source_digits: Tensor
    target: Tensor
    target_digits: Tensor
    target_test: Tensor
    target_test_digits: Tensor

    def to(self, device: str) -> "Domains":
        return Domains(*(tensor.to(device) for tensor in vars(self).values()))


def load_domains(args: Namespace) -> Domains:
    size = 28 if args.mnist else 16
    digits = data.load_digits(args.mnist, size)
    photos = data.load_photos(args.photos)
    # Smaller digits want smaller photographs, so that a crop shows as much as it would at MNIST's 28 pixels.
    photos = [F.interpolate(photo[None], scale_factor=size / 28, mode="bilinear", antialias=True)[0] for photo in photos]
    # The test's crops come from the right-hand third of the photographs, which training never sees.
    left = [photo[:, :, : photo.shape[2] * 2 // 3] for photo in photos]
    right = [photo[:, :, photo.shape[2] * 2 // 3 :] for photo in photos]
    generator = torch.Generator().manual_seed(0)
    source = digits.train_images.expand(-1, 3, -1, -1)
    target = torch.cat([data.blend(digits.train_images, left, generator) for _ in range(args.crops)])
    target_test = data.blend(digits.test_images, right, generator)
    mean = (source.mean((0, 2, 3), keepdim=True) + target.mean((0, 2, 3), keepdim=True)) / 2
    target_digits = digits.train_digits.repeat(args.crops)
    return Domains(source - mean, digits.train_digits, target - mean, target_digits, target_test - mean, digits.test_digits)


class Network(nn.Module):
    """The paper's network for MNIST: two convolutions, a label predictor of 100-100-10, a domain classifier of 100-1.

    The first layers of the two branches read the same features: `AdversarialHeads` does both in one pass, and the reversal.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        kernel = 5 if size >= 28 else 3
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        features = 48 * (size // 4) ** 2
        self.branches = grl_ext.AdversarialHeads(features, predictors={"digit": 100}, adversaries={"domain": 100}, lambda_=0.0)
        self.digit = nn.Sequential(nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        self.domain = nn.Sequential(nn.ReLU(), nn.Linear(100, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the digit (N, 10) and of the domain (N,)."""
        hidden = self.branches(self.encoder(images))
        return self.digit(hidden["digit"]), self.domain(hidden["domain"]).squeeze(1)


class Training:
    """One network in training, and all that it takes to resume it: weights, momentum, where the schedules are, the random draws."""

    def __init__(self, method: str, seed: int, domains: Domains, args: Namespace) -> None:
        self.method, self.domains = method, domains
        self.rows = args.batch // 2  # of each domain, over all processes together
        torch.manual_seed(seed)
        self.network = Network(domains.source.shape[-1]).to(args.device)
        self.model = DistributedDataParallel(self.network) if args.ddp else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=args.lr, momentum=0.9)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: (1 + 10 * step / args.steps) ** -0.75)
        # All methods run the same code; without reversal the domain classifier only watches.
        reversal = grl_ext.schedules.warm_start(args.gamma, hi=args.lambda_) if method == "DANN" else grl_ext.schedules.constant(0.0)
        self.lambdas = grl_ext.LambdaScheduler(self.network, reversal, args.steps)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, digits (unknown for one domain) and domains of this process's part of the batch, half from each domain."""
        part = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
        # Every process draws the whole batch and keeps its part, so that all draws are those of a single process.
        i, j = (
            torch.randint(len(images), (self.rows,), generator=self.generator)[part].to(images.device)
            for images in (self.domains.source, self.domains.target)
        )
        source_digits, target_digits = self.domains.source_digits[i], self.domains.target_digits[j]
        hidden = source_digits if self.method == "train on target" else target_digits
        hidden.fill_(NO_LABEL)
        images = torch.cat([self.domains.source[i], self.domains.target[j]])
        domain = torch.cat([torch.ones_like(i), torch.zeros_like(j)])
        return images, torch.cat([source_digits, target_digits]), domain

    def step(self) -> tuple[Tensor, Tensor]:
        """One step. Returns the losses of digit and domain."""
        images, digits, domain = self.batch()
        digit_logits, domain_logits = self.model(images)
        digit_loss = F.cross_entropy(digit_logits, digits, ignore_index=NO_LABEL)
        domain_loss = F.binary_cross_entropy_with_logits(domain_logits, domain.float())
        self.optimizer.zero_grad()
        (digit_loss + domain_loss).backward()
        self.optimizer.step()
        self.rate.step()
        self.lambdas.step()
        return digit_loss.detach(), domain_loss.detach()

    @property
    def steps_done(self) -> int:
        return self.lambdas.last_step

    @torch.no_grad()
    def target_accuracy(self) -> float:
        predicted = torch.cat([self.network(images)[0].argmax(1) for images in self.domains.target_test.split(1000)])
        return (predicted == self.domains.target_test_digits).float().mean().item()

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "rate", "lambdas")}
        return {**parts, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("network", "optimizer", "rate", "lambdas"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])


def train(training: Training, checkpoint: Path, args: Namespace, progress: tqdm) -> None:
    """To the end, from the checkpoint if there is one and `--resume` asks for it."""
    if args.resume and checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, map_location=args.device))
        progress.update(training.steps_done)
    while training.steps_done < args.steps:
        digit_loss, domain_loss = training.step()
        progress.update()
        if training.steps_done % 100 == 0 or training.steps_done == args.steps:
            # Read rarely: on a GPU each look at a loss waits for the device.
            progress.set_postfix(digit=f"{digit_loss:.2f}", domain=f"{domain_loss:.2f}")
            if is_first_process():
                torch.save(training.state_dict(), checkpoint)


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def plot(trained: dict[str, Training], domains: Domains, results: dict):
    """Some images of both domains; the accuracies; and the features of the source-only network and of DANN, in two dimensions."""
    figure, axes = experiment.plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained", width_ratios=[0.8, 0.9, 1, 1])
    rows = [torch.cat(list(images[:5].cpu()), 2) for images in (domains.source, domains.target, domains.target_test)]
    picture = torch.cat(rows, 1).permute(1, 2, 0)
    axes[0].imshow(((picture - picture.min()) / (picture.max() - picture.min())).numpy())
    size = domains.source.shape[-1]
    axes[0].set_yticks([size * (i + 0.5) for i in range(3)], ["source", "target,\ntraining", "target,\ntest"])
    axes[0].set(xticks=[], title="the data")
    axes[0].tick_params(length=0)
    accuracies = [results[method]["target_accuracy"] for method in METHODS]
    colours = [experiment.COLOURS[name] for name in ("grey", "blue", "green")]
    axes[1].bar(METHODS, [a["mean"] for a in accuracies], yerr=[a["sd"] for a in accuracies], color=colours, capsize=4)
    for i, accuracy in enumerate(accuracies):
        axes[1].text(i, accuracy["mean"] / 2, f"{accuracy['mean']:.3f}\n± {accuracy['sd']:.3f}", ha="center", color="white")
    axes[1].set(ylim=(0, 1), title=f"target accuracy; gap closed: {results['gap_closed']['mean']:.0%}")
    for axis, method in zip(axes[2:], ("source only", "DANN"), strict=True):
        with torch.no_grad():
            features = trained[method].network.encoder(torch.cat([domains.source[:400], domains.target[:400]])).cpu()
        _, _, directions = torch.pca_lowrank(features, 2)
        points = (features - features.mean(0)) @ directions
        for name, tint, part in (("source", "blue", points[:400]), ("target", "orange", points[400:])):
            axis.scatter(*part.T.numpy(), s=7, alpha=0.6, color=experiment.COLOURS[tint], label=name)
        axis.set(title=f"{method}: features\n(first two principal components)", xticks=[], yticks=[])
    axes[3].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    return figure


def main(arguments: list[str] | None = None) -> dict | None:
    options = experiment.parser("dann_digits", __doc__.splitlines()[0], seeds=3)
    options.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files (gz or not), instead of scikit-learn's digits")
    options.add_argument("--photos", type=Path, help="folder with pictures, instead of scikit-learn's two")
    options.add_argument("--crops", type=int, default=4, help="target images made of each digit (1 in MNIST-M)")
    options.add_argument("--steps", type=int, default=2500)
    options.add_argument("--batch", type=int, default=128, help="half from each domain")
    options.add_argument("--lr", type=float, default=0.03, help="at the start; falls as lr / (1 + 10 p)^0.75")
    options.add_argument("--gamma", type=float, default=10.0, help="how fast lambda rises")
    options.add_argument("--lambda", dest="lambda_", type=float, default=1.0, help="where lambda rises to")
    options.add_argument("--resume", action="store_true", help="continue from the checkpoints in the output folder")
    options.add_argument("--ddp", action="store_true", help="one of several processes started by torchrun")
    args = options.parse_args(arguments)
    if args.ddp:
        on_cuda = args.device.startswith("cuda")
        dist.init_process_group("nccl" if on_cuda else "gloo")
        if on_cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    try:
        return run(args)
    finally:
        if args.ddp:
            dist.destroy_process_group()


def run(args: Namespace) -> dict | None:
    domains = load_domains(args).to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    accuracy: dict[str, list[float]] = {method: [] for method in METHODS}
    trained: dict[str, Training] = {}
    with tqdm(total=len(METHODS) * args.seeds * args.steps, unit="step", disable=not is_first_process()) as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            for method in METHODS:
                progress.set_description(f"{method}, seed {seed}")
                trained[method] = Training(method, seed, domains, args)
                train(trained[method], args.out / f"{method.replace(' ', '_')}-{seed}.pt", args, progress)
                accuracy[method].append(trained[method].target_accuracy())
    if not is_first_process():
        return None
    closed = [(dann - low) / (high - low) if high != low else 0.0 for low, dann, high in zip(*accuracy.values(), strict=True)]
    results = {method: {"target_accuracy": experiment.spread(values)} for method, values in accuracy.items()}
    results["gap_closed"] = experiment.spread(closed)
    finding = (
        "finding: target accuracy "
        + ", ".join(f"{method} {experiment.shown(results[method]['target_accuracy'])}" for method in METHODS)
        + f"; gap closed {experiment.shown(results['gap_closed'], 2)} (published on MNIST-M: .5225, .7666, .9596; 0.56)"
    )
    return experiment.finish(args, results, plot(trained, domains, results), finding)


if __name__ == "__main__":
    main()
