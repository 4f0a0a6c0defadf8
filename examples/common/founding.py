"""The network of the founding experiment and its losses, for `pair_digits.py` and for the benchmark."""

import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1764  # 36 channels of 7 x 7


class MnistNN2(nn.Module):
    """Two convolutions; a linear predictor; a linear adversary behind `reversal`, which is the only part that
    varies."""

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
