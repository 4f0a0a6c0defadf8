"""The experiment that this project began with (does a pair of digits contain a zero?), as the examples have it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts, not part of the package

from common.data import digit_pairs, scaled_digits  # noqa: E402
from common.founding import FEATURES, MnistNN2, losses  # noqa: E402

__all__ = ["FEATURES", "MnistNN2", "digit_pairs", "losses", "scaled_digits"]
