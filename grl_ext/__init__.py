"""Gradient reversal that costs nothing: a fused layer and fused adversarial heads for PyTorch."""

from grl_ext import schedules
from grl_ext.functional import HeadsOutput, gradient_reversal, grl_linear, heads_cross_entropy, linear_heads
from grl_ext.modules import GRL, AdversarialHeads, GRLLinear
from grl_ext.schedules import LambdaScheduler

__version__ = "0.2.0"

__all__ = [
    "GRL",
    "AdversarialHeads",
    "GRLLinear",
    "HeadsOutput",
    "LambdaScheduler",
    "gradient_reversal",
    "grl_linear",
    "heads_cross_entropy",
    "linear_heads",
    "schedules",
]
