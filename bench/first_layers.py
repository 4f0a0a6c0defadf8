"""The first layers of two heads: two products, or one with the weights copied one below the other (docs/design.md)."""

from functools import partial

import torch
from torch import Tensor

import compare
import measure

LAMBDA = 0.3
SHAPES = [
    (128, 768, (100, 100)),
    (64, 256, (10, 1024)),
    (4096, 1024, (10, 1024)),
]  # rows, features, outputs of a predictor, an adversary

Gradients = list[Tensor]


def two_products(x: Tensor, weights: list[Tensor], biases: list[Tensor], grads: list[Tensor]) -> Gradients:
    """The outputs, and from their gradients those of the features and of each weight."""
    for weight, bias in zip(weights, biases, strict=True):
        torch.addmm(bias, x, weight.t())
    dx = grads[0].mm(weights[0])
    dx.addmm_(grads[1], weights[1], alpha=-LAMBDA)
    return [dx, *(grad.t().mm(x) for grad in grads)]


def one_product(x: Tensor, weights: list[Tensor], biases: list[Tensor], grads: list[Tensor]) -> Gradients:
    weight = torch.cat(weights)
    torch.addmm(torch.cat(biases), x, weight.t())
    dx = torch.cat([grads[0], grads[1] * -LAMBDA], 1).mm(weight)
    return [dx, *torch.cat(grads, 1).t().mm(x).split([len(own) for own in weights])]


def main() -> None:
    print(compare.headline(compare.environment(compare.cases.Settings("cpu", torch.float32, quick=False))))
    print("medians in us of interleaved rounds")
    for rows, features, outputs in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(rows, features)
        weights = [torch.randn(size, features) for size in outputs]
        arguments = x, weights, [torch.randn(size) for size in outputs], [torch.randn(rows, size) for size in outputs]
        torch.testing.assert_close(two_products(*arguments), one_product(*arguments), rtol=1e-3, atol=1e-2)
        steps = {form.__name__: partial(form, *arguments) for form in (two_products, one_product)}
        samples = measure.interleave(steps, measure.wall_timer(), seconds=4.0, min_rounds=9)
        medians = {name: sorted(own)[len(own) // 2] * 1e6 for name, own in samples.items()}
        print(
            f"{rows}x{features}, {'+'.join(map(str, outputs))}: "
            + ", ".join(f"{name} {us:.0f}" for name, us in medians.items())
        )


if __name__ == "__main__":
    main()
