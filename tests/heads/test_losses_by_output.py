"""Several labels at once ("bce"), and weights of single entries for it and for "mse"."""

import pytest
import torch
import torch.nn.functional as F
from head_samples import DTYPES, SWITCH, check_loss, naive_loss, our_loss, sample_heads, second_order
from samples import assert_same

from grl_ext import AdversarialHeads, heads_loss

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]

KINDS = ("bce", "mse", "classes")
SIZES = [(3, 1, 2, 5), (SWITCH, 1, 2, 2), ((4, 3), 1, (5, 2), 2)]
on_sizes = pytest.mark.parametrize("head_sizes", SIZES, ids=str)


def entry_weights(sample, share=0.4):
    """Of every second head that can have some."""
    weights = []
    for h, target in enumerate(sample.targets):
        takes = sample.losses[h] != "cross_entropy" and h % 4 < 2
        weights.append(torch.rand(target.shape) * (torch.rand(target.shape) > share) if takes else None)
    return weights


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 4])
def test_bce_is_pytorchs_binary_cross_entropy(device, size, reduction):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(size,), kinds=("bce",))
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    expected = F.binary_cross_entropy_with_logits(z, sample.targets[0].double(), reduction=reduction)
    torch.testing.assert_close(our_loss(sample, reduction=reduction).loss, expected)


def test_bce_of_one_output_is_the_cross_entropy_of_a_binary_head(device):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(1,), kinds=("bce",))
    binary = sample._replace(losses=None, targets=[sample.targets[0][:, 0]])
    torch.testing.assert_close(our_loss(sample).loss, our_loss(binary).loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_sizes
def test_equals_the_layers(device, head_sizes, dtype):
    sample = sample_heads(device, dtype, (70,), 7, head_sizes, kinds=KINDS)
    check_loss(sample)
    check_loss(sample, sample_weight=entry_weights(sample))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (130,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_shape_and_reduction_equals_the_layers(device, leading, reduction):
    sample = sample_heads(device, torch.float64, leading, 9, (3, 2, 1, 1, 4), kinds=("bce", "mse"))
    check_loss(sample, reduction=reduction)
    check_loss(sample, reduction=reduction, sample_weight=entry_weights(sample), loss_weight=[0.5, 2.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float16])
def test_targets_of_bce_may_be_of_any_of_these_types(device, dtype):
    sample = sample_heads(device, torch.float32, (6,), head_sizes=(3,), kinds=("bce",))
    expected = our_loss(sample._replace(targets=[sample.targets[0].float()]))
    ours = our_loss(sample._replace(targets=[sample.targets[0].to(dtype)]))
    assert torch.equal(ours.loss, expected.loss)


def test_targets_between_0_and_1(device):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(3, 1), kinds=("bce",))
    check_loss(sample._replace(targets=[torch.rand(70, 3), torch.rand(70)]), outputs="all")


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_an_entry_of_weight_0_is_ignored_whatever_its_target(device, kind):
    sample = sample_heads(device, torch.float64, (70,), 7, (3, 2), kinds=(kind,))
    weights = [(torch.rand(70, 3) > 0.4).double(), (torch.rand(70, 2) > 0.4).double()]
    missing = [t.double().masked_fill(w == 0, torch.nan) for t, w in zip(sample.targets, weights, strict=True)]
    results = []
    for targets in (sample.targets, missing):
        own = sample.map(torch.clone)._replace(targets=targets)
        out = our_loss(own, sample_weight=weights)
        results.append([out.loss, *out.head_losses, *torch.autograd.grad(out.loss, own.wanted)])
    assert_same(*results)
    assert results[0][0].isfinite()


def test_a_head_all_of_whose_entries_are_missing_has_no_loss(device):
    sample = sample_heads(device, torch.float32, (6,), 7, (3, 2), kinds=("bce",))
    out = our_loss(sample, sample_weight=[torch.zeros(6, 3), None])
    assert out.head_losses[0] == 0
    assert torch.equal(out.loss, out.head_losses[1])
    (grad,) = torch.autograd.grad(out.head_losses[0], sample.weight[0][0])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_an_impossible_target_costs_nothing_where_the_logit_is_infinite(device):
    """Labels that cannot be, masked by a logit of -infinity."""
    x, weight = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    bias = torch.tensor([-torch.inf, 0.0])
    out = heads_loss(x, [weight], [bias], [torch.tensor([[0, 1], [0, 0]])], lambda_=[None], losses=["bce"])
    torch.testing.assert_close(out.loss, torch.tensor(2.0).log() / 2)


@on_sizes
def test_gradients_of_gradients_equal_the_layers(device, head_sizes):
    sample = sample_heads(device, torch.float64, (6,), 7, head_sizes, kinds=KINDS)
    options = {"sample_weight": entry_weights(sample)}
    results = [
        second_order(lambda *t, f=f: f(sample.of(t), **options).loss, *sample.inputs) for f in (our_loss, naive_loss)
    ]
    torch.testing.assert_close(*results)


def test_maps_have_their_labels_in_the_same_place(device):
    heads = AdversarialHeads(4, {"tags": 3}, {"depth": 2}, losses={"tags": "bce", "depth": "mse"}, dim=1).to(device)
    x = torch.randn(2, 4, 5, 6)
    tags, depth, weight = torch.rand(2, 3, 5, 6) > 0.5, torch.randn(2, 2, 5, 6), torch.rand(2, 3, 5, 6)
    out = heads(x, {"tags": tags, "depth": depth}, sample_weight={"tags": weight})
    z = out.logits["tags"]
    assert z.shape == tags.shape
    entries = F.binary_cross_entropy_with_logits(z, tags.float(), weight, reduction="sum") / weight.sum()
    torch.testing.assert_close(out.head_losses["tags"], entries)
    torch.testing.assert_close(out.head_losses["depth"], F.mse_loss(out.logits["depth"], depth))


# --- refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, options, message",
    [
        (torch.full((5, 3), 2), {}, r"targets\['tags'\] must be in \[0, 1\], got 2"),
        (torch.full((5, 3), torch.nan), {}, r"targets\['tags'\] must be in \[0, 1\], got nan"),
        (torch.ones(5, dtype=torch.int64), {}, r"targets\['tags'\] must have shape \[5, 3\], got \[5\]"),
        (torch.ones(5, 3, dtype=torch.int32), {}, r"targets\['tags'\] must be 0 and 1 .* got torch.int32"),
        (
            torch.ones(5, 3),
            {"sample_weight": {"tags": torch.ones(5, 2)}},
            r"sample_weight\['tags'\] must have shape \[5, 3\], got \[5, 2\]",
        ),
        (
            torch.ones(5, 3),
            {"sample_weight": {"tags": -torch.ones(5, 3)}},
            r"sample_weight\['tags'\] must be finite and not negative, got -1",
        ),
        (
            torch.ones(5, 3),
            {"class_weight": {"tags": torch.ones(3)}},
            r"class_weight\['tags'\] is for a cross entropy, this head has a binary cross entropy for each output",
        ),
        (
            torch.ones(5, 3),
            {"label_smoothing": {"tags": 0.1}},
            r"label_smoothing\['tags'\] is for a cross entropy, this head has a binary cross entropy for each output",
        ),
    ],
)
def test_what_bce_does_not_take(device, target, options, message):
    heads = AdversarialHeads(4, {"digit": 2}, {"tags": 3}, losses={"tags": "bce"})
    with pytest.raises((ValueError, TypeError), match=message):
        heads(torch.randn(5, 4), {"tags": target}, **options)


def test_a_cross_entropy_has_no_weights_of_entries(device):
    heads = AdversarialHeads(4, {"digit": 3})
    with pytest.raises(ValueError, match=r"sample_weight\['digit'\] must have shape \[5\], got \[5, 3\]"):
        heads(torch.randn(5, 4), {"digit": torch.zeros(5).long()}, sample_weight=torch.ones(5, 3))
