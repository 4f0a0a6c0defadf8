"""Domain adaptation: learn digits from clean images, read them in front of photographs, without a label there.

The source is clean digits; the target is the same kind of digits blended with photographs by absolute difference, the
recipe of MNIST-M. The domain-adversarial network (Ganin et al., JMLR 2016) learns digits from source labels alone, from
features in which an adversary cannot tell the domains apart. It stands between two networks of the same shape: one
trained on the source only, one on target labels that the others never see. The share of that gap it closes is the
result. The control is the source-only network with the target's batch-norm statistics (AdaBN): what DANN adds to it is
what the reversal does.
Distributed: `torchrun --nproc-per-node 2 examples/dann_digits.py --ddp` gives the same run as one process.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import data, experiment
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import grl_ext

TRAINED = ("source only", "DANN", "train on target")
JUDGED = ("source only", "AdaBN control", "DANN", "train on target")


@dataclass(frozen=True)
class Domains:
    """Clean and blended images with their digits (N,). Target digits serve only as upper bound and as test."""

    source: Tensor  # (N, 1, size, size); grey, and shown to the networks as three equal channels
    source_digits: Tensor
    target: data.Blended
    target_digits: Tensor
    target_test: data.Blended
    target_test_digits: Tensor

    def to(self, device: str) -> "Domains":
        return Domains(*(part.to(device) for part in vars(self).values()))


def load_domains(args: Namespace) -> Domains:
    size = 28 if args.mnist else 16
    digits = data.load_digits(args.mnist, size)
    photos = data.load_photos(args.photos)
    # Smaller digits want smaller photographs, so that a crop shows as much as it would at MNIST's 28 pixels.
    photos = [
        F.interpolate(photo[None], scale_factor=size / 28, mode="bilinear", antialias=True)[0] for photo in photos
    ]
    # The test's crops come from the right-hand third of the photographs, which training never sees.
    left = [photo[:, :, : photo.shape[2] * 2 // 3] for photo in photos]
    right = [photo[:, :, photo.shape[2] * 2 // 3 :] for photo in photos]
    generator = torch.Generator().manual_seed(0)
    target = data.blend(digits.train_images, left, generator, args.crops)
    target_test = data.blend(digits.test_images, right, generator)
    return Domains(
        digits.train_images,
        digits.train_digits,
        target,
        digits.train_digits.repeat(args.crops),
        target_test,
        digits.test_digits,
    )


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes (`SyncBatchNorm` is for GPUs only).

    Training leaves the running statistics alone. Which domain's they are is decided afterwards, by `update_bn`.
    """

    def forward(self, images: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(images)
        if not dist.is_initialized():
            return F.batch_norm(images, None, None, self.weight, self.bias, training=True, eps=self.eps)
        centred = images - mean_of_all_processes(images)
        scale = (mean_of_all_processes(centred.square()) + self.eps).rsqrt() * self.weight.view(-1, 1, 1)
        return centred * scale + self.bias.view(-1, 1, 1)


def mean_of_all_processes(images: Tensor) -> Tensor:
    return all_reduce(images.mean((0, 2, 3), keepdim=True)) / dist.get_world_size()


class Network(nn.Module):
    """The paper's network for MNIST: two convolutions, a label predictor of 100-100-10, a domain classifier of 100-1.

    With batch norm, which the paper's has not: without it the adversary wins as lambda nears 1. No mean is subtracted
    from the images, because batch norm after a convolution without padding removes it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        kernel = 5 if size >= 28 else 3
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, kernel, bias=False),  # batch norm removes a bias too
            BatchNorm(32),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 48, kernel, bias=False),
            BatchNorm(48),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
        )
        extent = ((size - kernel + 1) // 2 - kernel + 1) // 2
        features = 48 * extent**2
        self.heads = grl_ext.AdversarialHeads(features, {"digit": [100, 100, 10]}, {"domain": [100, 1]})

    def forward(self, *domains: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the digit (N, 10) for the images of one or of both domains; of the domain (N,) where there are
        both.

        The encoder sees the domains one after the other, so that batch norm takes each one's own statistics.
        """
        features = torch.cat([self.encoder(images) for images in domains])
        if len(domains) == 1:
            return self.heads.predictors["digit"](features), None
        logits = self.heads(features)
        return logits["digit"], logits["domain"].squeeze(1)


class Training:
    """One network in training, and all that it takes to resume it: weights, Adam's state, where lambda is, the random
    draws."""

    def __init__(self, method: str, seed: int, domains: Domains, args: Namespace) -> None:
        self.method, self.domains = method, domains
        self.rows = args.batch // 2  # of each domain, over all processes together
        torch.manual_seed(seed)
        self.network = Network(domains.source.shape[-1]).to(args.device)
        # Only DANN sees both domains and uses the domain classifier.
        self.model = (
            DistributedDataParallel(self.network, find_unused_parameters=method != "DANN") if args.ddp else self.network
        )
        # Little momentum, as is usual where two networks play against each other.
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=args.lr, betas=(0.5, 0.999))
        self.lambdas = grl_ext.LambdaScheduler(
            self.network, grl_ext.schedules.warm_start(args.gamma, hi=args.lambda_), args.steps
        )
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """This process's part of the batch: the images of each domain that the method sees, and the digits of the first
        one."""
        part = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
        # Every process draws the whole batch and keeps its part, so that all draws are those of a single process.
        i, j = (
            torch.randint(len(images), (self.rows,), generator=self.generator)[part].to(images.device)
            for images in (self.domains.source_digits, self.domains.target_digits)
        )
        if self.method == "train on target":
            return (self.domains.target[j],), self.domains.target_digits[j]
        source = self.domains.source[i].expand(-1, 3, -1, -1)
        images = (source, self.domains.target[j]) if self.method == "DANN" else (source,)
        return images, self.domains.source_digits[i]

    def step(self) -> dict[str, Tensor]:
        """One step. Returns the losses, of the digit and for DANN of the domain."""
        images, digits = self.batch()
        digit_logits, domain_logits = self.model(*images)
        losses = {"digit": F.cross_entropy(digit_logits[: len(digits)], digits)}
        if domain_logits is not None:
            is_source = torch.cat([torch.ones(len(images[0])), torch.zeros(len(images[1]))]).to(domain_logits.device)
            losses["domain"] = F.binary_cross_entropy_with_logits(domain_logits, is_source)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        self.lambdas.step()
        return {name: loss.detach() for name, loss in losses.items()}

    @property
    def steps_done(self) -> int:
        return self.lambdas.last_step

    def judge(self) -> dict[str, dict[str, float]]:
        """On the test images, with the batch-norm statistics of the domain that the method may use: training images, no
        label."""
        if self.method != "source only":
            self.use_statistics_of("target")
            return {self.method: self.target_accuracy()}
        # The same network twice. AdaBN may see target images, but learns nothing from them but their statistics.
        self.use_statistics_of("source")
        own = self.target_accuracy()
        self.use_statistics_of("target")
        return {"source only": own, "AdaBN control": self.target_accuracy()}

    def use_statistics_of(self, domain: str) -> None:
        self.network.eval()  # `update_bn` leaves the network in the mode that it finds
        update_bn(self.images(domain, 10_000), self.network.encoder)

    def images(self, domain: str, n: int) -> Iterator[Tensor]:
        """Training images of one domain in portions, spread over the whole set."""
        whole = self.domains.source if domain == "source" else self.domains.target
        rows = torch.linspace(
            0, len(whole) - 1, min(n, len(whole)), dtype=torch.float64, device=self.domains.source.device
        ).long()
        for portion in rows.split(250):
            yield whole[portion].expand(-1, 3, -1, -1)

    @torch.no_grad()
    def target_accuracy(self) -> dict[str, float]:
        """Of all test images, and of those in front of dark and of bright crops, where the difference makes a digit its
        negative."""
        digits = self.domains.target_test_digits
        right, is_bright = [], []
        for rows in torch.arange(len(digits), device=digits.device).split(250):
            right.append(self.network(self.domains.target_test[rows])[0].argmax(1) == digits[rows])
            is_bright.append(self.domains.target_test.backgrounds(rows).mean((1, 2, 3)) > 0.5)
        right, is_bright = torch.cat(right).float(), torch.cat(is_bright)
        parts = {"target_accuracy": right, "on_dark_crops": right[~is_bright], "on_bright_crops": right[is_bright]}
        return {name: part.mean().item() for name, part in parts.items() if len(part)}

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "lambdas")}
        return {**parts, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("network", "optimizer", "lambdas"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])


def train(training: Training, checkpoint: Path, args: Namespace, progress: tqdm) -> None:
    """To the end, from the checkpoint if there is one and `--resume` asks for it. The last step counts: no label
    chooses a better one."""
    if args.resume and checkpoint.exists():
        # To the CPU first: that is where the generator's state belongs; the rest moves to the device as it is loaded.
        training.load_state_dict(torch.load(checkpoint, map_location="cpu"))
        progress.update(training.steps_done)
    while training.steps_done < args.steps:
        losses = training.step()
        progress.update()
        if training.steps_done % 100 == 0 or training.steps_done == args.steps:
            # Read rarely: on a GPU each look at a loss waits for the device.
            progress.set_postfix({name: f"{loss:.2f}" for name, loss in losses.items()})
            if is_first_process():
                torch.save(training.state_dict(), checkpoint)


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@torch.no_grad()
def features(training: Training, n: int) -> tuple[Tensor, Tensor]:
    """Features of n training images of each domain, as the network would see them: DANN with each domain's own
    statistics."""
    found = []
    for domain in ("source", "target"):
        training.use_statistics_of(domain if training.method == "DANN" else "source")
        found.append(torch.cat([training.network.encoder(images) for images in training.images(domain, n)]))
    return tuple(found)


def plot(trained: dict[str, Training], domains: Domains, results: dict):
    """Some images of both domains; the accuracies; and the features of the source-only network and of DANN, in two
    dimensions."""
    figure, axes = experiment.plt.subplots(1, 4, figsize=(16, 3.9), layout="constrained", width_ratios=[0.8, 1.2, 1, 1])
    some = torch.arange(5, device=domains.source.device)
    shown = (domains.source[some].expand(-1, 3, -1, -1), domains.target[some], domains.target_test[some])
    picture = torch.cat([torch.cat(list(images.cpu()), 2) for images in shown], 1)
    axes[0].imshow(picture.permute(1, 2, 0).numpy())
    size = domains.source.shape[-1]
    axes[0].set_yticks([size * (i + 0.5) for i in range(3)], ["source", "target,\ntraining", "target,\ntest"])
    axes[0].set(xticks=[], title="the data")
    axes[0].tick_params(length=0)
    accuracies = [results[method]["target_accuracy"] for method in JUDGED]
    colours = [experiment.COLOURS[name] for name in ("grey", "pink", "blue", "green")]
    axes[1].bar(
        [m.replace(" ", "\n", 1) for m in JUDGED],
        [a["mean"] for a in accuracies],
        yerr=[a["sd"] for a in accuracies],
        color=colours,
        capsize=4,
    )
    for i, accuracy in enumerate(accuracies):
        axes[1].text(
            i, accuracy["mean"] / 2, f"{accuracy['mean']:.3f}\n± {accuracy['sd']:.3f}", ha="center", color="white"
        )
    axes[1].set(ylim=(0, 1), title=f"target accuracy; gap closed: {results['gap_closed']['mean']:.0%}")
    for axis, method in zip(axes[2:], ("source only", "DANN"), strict=True):
        parts = features(trained[method], 400)
        both = torch.cat(parts)
        _, _, directions = torch.pca_lowrank(both, 2)
        for name, tint, part in zip(("source", "target"), ("blue", "orange"), parts, strict=True):
            points = ((part - both.mean(0)) @ directions).cpu()
            axis.scatter(*points.T.numpy(), s=7, alpha=0.6, color=experiment.COLOURS[tint], label=name)
        axis.set(title=f"{method}: features\n(first two principal components)", xticks=[], yticks=[])
    axes[3].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    return figure


def main(arguments: list[str] | None = None) -> dict | None:
    options = experiment.parser("dann_digits", __doc__.splitlines()[0], seeds=3)
    options.add_argument(
        "--mnist", type=Path, help="folder with MNIST's IDX files (gz or not), instead of scikit-learn's digits"
    )
    options.add_argument(
        "--photos", help="a folder with pictures, or scikit-image for those of its wheel; default: scikit-learn's two"
    )
    options.add_argument(
        "--crops",
        type=int,
        help="target images made of each digit; default: 1 of MNIST's (as MNIST-M), 4 of scikit-learn's",
    )
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batch", type=int, default=128, help="half from each domain")
    options.add_argument("--lr", type=float, default=5e-4, help="of Adam, constant")
    options.add_argument("--gamma", type=float, default=10.0, help="how fast lambda rises")
    options.add_argument("--lambda", dest="lambda_", type=float, default=1.0, help="where lambda rises to")
    options.add_argument("--resume", action="store_true", help="continue from the checkpoints in the output folder")
    options.add_argument("--ddp", action="store_true", help="one of several processes started by torchrun")
    args = options.parse_args(arguments)
    if args.crops is None:
        args.crops = 1 if args.mnist else 4
    if args.ddp:
        on_cuda = args.device.startswith("cuda")
        dist.init_process_group("nccl" if on_cuda else "gloo")
        if on_cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    try:
        if args.ddp and args.batch // 2 % dist.get_world_size():
            options.error(f"--batch {args.batch}: half of it must divide among {dist.get_world_size()} processes")
        return run(args)
    finally:
        if args.ddp:
            dist.destroy_process_group()


def run(args: Namespace) -> dict | None:
    domains = load_domains(args).to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in JUDGED}
    trained: dict[str, Training] = {}
    with tqdm(total=len(TRAINED) * args.seeds * args.steps, unit="step", disable=not is_first_process()) as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            for method in TRAINED:
                progress.set_description(f"{method}, seed {seed}")
                trained[method] = Training(method, seed, domains, args)
                train(trained[method], args.out / f"{method.replace(' ', '_')}-{seed}.pt", args, progress)
                for judged, accuracies in trained[method].judge().items():
                    found[judged].append(accuracies)
    if not is_first_process():
        return None
    results = {
        method: {name: experiment.spread([accuracies[name] for accuracies in runs]) for name in runs[0]}
        for method, runs in found.items()
    }
    low, control, dann, high = ([accuracies["target_accuracy"] for accuracies in found[method]] for method in JUDGED)
    closed = [(b - a) / (c - a) if c != a else 0.0 for a, b, c in zip(low, dann, high, strict=True)]
    results["gap_closed"] = experiment.spread(closed)
    results["over_control"] = experiment.spread([b - a for a, b in zip(control, dann, strict=True)])
    finding = (
        "finding: target accuracy "
        + ", ".join(f"{method} {experiment.shown(results[method]['target_accuracy'])}" for method in JUDGED)
        + f"; gap closed {experiment.shown(results['gap_closed'], 2)}"
        + f"; DANN over the control {experiment.shown(results['over_control'])}; DANN "
        + ", ".join(
            f"{name.replace('_', ' ')} {experiment.shown(results['DANN'][name])}" for name in list(results["DANN"])[1:]
        )
        + " (published on MNIST-M: source only .5225, DANN .7666, train on target .9596; 0.56)"
    )
    return experiment.finish(args, results, plot(trained, domains, results), finding)


if __name__ == "__main__":
    main()
