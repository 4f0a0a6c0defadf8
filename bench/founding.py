"""The experiment that this project began with: does a pair of digits contain a zero? Its data, its network and its loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1764  # 36 channels of 7 x 7


class MnistNN2(nn.Module):
    """Two convolutions; a linear predictor; a linear adversary behind `reversal`, which is the only part that varies."""

    def __init__(self, reversal: nn.Module) -> None:
        super().__init__()
        self.extractor = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 36, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.out = nn.Linear(FEATURES, 2)
        self.reversal = reversal
        self.advout = nn.Linear(FEATURES, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 1, 28, 28) -> features (N, 1764), predictor's and adversary's logits (N, 2)."""
        features = self.extractor(images)
        return features, self.out(features), self.advout(self.reversal(features))


def losses(network: MnistNN2, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predictor's loss on the label and the adversary's on its complement."""
    _, prediction, adversarial = network(images)
    return F.cross_entropy(prediction, labels), F.cross_entropy(adversarial, 1 - labels)


def scaled_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, 8x8 scaled to 28x28: images (1797, 1, 28, 28) in [0, 1], digits (1797,)."""
    from sklearn.datasets import load_digits  # heavy to import, and only this case needs it

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return F.interpolate(images, size=(28, 28), mode="bilinear"), torch.from_numpy(data.target).long()


def digit_pairs(images: Tensor, digits: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n coin flips. Heads (label 1): a zero and another digit, added pixel by pixel; tails (label 0): two others."""

    def draw(candidates: Tensor) -> Tensor:
        return images[candidates[torch.randint(len(candidates), (n,), generator=generator)]]

    zeros, others = (digits == 0).nonzero().squeeze(1), (digits != 0).nonzero().squeeze(1)
    labels = torch.randint(2, (n,), generator=generator)
    second = torch.where(labels.view(-1, 1, 1, 1) == 1, draw(zeros), draw(others))
    return draw(others) + second, labels
