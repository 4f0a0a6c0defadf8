"""Gradient reversal for PyTorch: a fused layer and fused adversarial heads, in C++ and CUDA."""

__version__ = "0.2.0"

from grl_ext import schedules, testing
from grl_ext.functional import HeadsLoss, gradient_reversal, grl_linear, heads_loss, linear_heads
from grl_ext.heads import AdversarialHeads, HeadsOutput
from grl_ext.modules import GRL, GRLLinear
from grl_ext.schedules import LambdaScheduler

__all__ = [
    "GRL",
    "AdversarialHeads",
    "GRLLinear",
    "HeadsLoss",
    "HeadsOutput",
    "LambdaScheduler",
    "gradient_reversal",
    "grl_linear",
    "heads_loss",
    "linear_heads",
    "schedules",
    "testing",
]
