"""Peak memory of a linear adversary conditioned on the predictions: over the outer product, and without it
(docs/recipes.md).

Forward and backward, with the gradients of features, weight and bias. What counts is what the step holds beyond its
inputs.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import compare
import grl_ext
from measure import peak_memory

LAMBDA = 0.3


def outer_product(features: Tensor, predictions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """CDAN's multilinear map (Long et al. 2018), then a linear layer."""
    reversed_ = grl_ext.gradient_reversal(features, LAMBDA)
    return F.linear((predictions[:, :, None] * reversed_[:, None, :]).flatten(1), weight, bias)


def contraction(features: Tensor, predictions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same logits from each class's own, weighted by the predictions."""
    (n, d), c, k = features.shape, predictions.shape[1], len(weight)
    (logits,) = grl_ext.linear_heads(features, [weight.view(k * c, d)], lambda_=[LAMBDA])
    return torch.einsum("nkc,nc->nk", logits.view(n, k, c), predictions) + bias


def peaks(rows: int, features: int, classes: int, domains: int) -> dict[str, int]:
    """Bytes, by form."""
    torch.manual_seed(0)
    f = torch.randn(rows, features, requires_grad=True)
    p = torch.randn(rows, classes).softmax(1)
    w = torch.randn(domains, classes * features, requires_grad=True)
    b = torch.zeros(domains, requires_grad=True)
    target = torch.randint(domains, (rows,))

    def step(form):
        return lambda: torch.autograd.grad(F.cross_entropy(form(f, p, w, b), target), [f, w, b])

    return {form.__name__: peak_memory(step(form), "cpu") for form in (outer_product, contraction)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=64, help="of both domains together")
    options.add_argument("--features", type=int, default=2048, help="ResNet-50's")
    options.add_argument("--classes", type=int, default=65, help="Office-Home's")
    options.add_argument("--domains", type=int, default=2)
    args = options.parse_args()
    found = peaks(**vars(args))
    print(compare.headline(compare.environment(compare.cases.Settings("cpu", torch.float32, quick=False))))
    print(f"{args.rows} rows, {args.features} features, {args.classes} classes, {args.domains} domains")
    for name, count in found.items():
        print(f"{name.replace('_', ' ')}: {count / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
