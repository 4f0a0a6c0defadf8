"""Heads give logits, and a cross entropy takes classes or probabilities: what is neither is refused, not computed."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grl_ext import AdversarialHeads, heads_loss

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


# --- logits ----------------------------------------------------------------------------------------------------------


class Discriminator(nn.Sequential):
    pass


class Wrapper(nn.Module):
    """As torch.compile's and FSDP1's."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, x):
        return self._orig_mod(x)


def layers(*last, size=1):
    return [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, size), *last]


ENDING = {
    "Sigmoid": (lambda: nn.Sequential(*layers(nn.Sigmoid())), "Sigmoid"),
    "Hardsigmoid": (lambda: nn.Sequential(*layers(nn.Hardsigmoid())), "Hardsigmoid"),
    "LogSigmoid": (lambda: nn.Sequential(*layers(nn.LogSigmoid())), "LogSigmoid"),
    "Softmax": (lambda: nn.Sequential(*layers(nn.Softmax(-1), size=2)), "Softmax"),
    "Softmin": (lambda: nn.Sequential(*layers(nn.Softmin(-1), size=2)), "Softmin"),
    "subclass": (lambda: Discriminator(*layers(nn.Sigmoid())), "Sigmoid"),
    "nested": (lambda: nn.Sequential(nn.Tanh(), nn.Sequential(*layers(nn.Sigmoid()))), "Sigmoid"),
    "wrapped": (lambda: Wrapper(nn.Sequential(*layers(nn.Sigmoid()))), "Sigmoid"),
    "identity behind it": (lambda: nn.Sequential(*layers(nn.Sigmoid(), nn.Identity())), "Sigmoid"),
    "begins otherwise": (lambda: nn.Sequential(nn.Tanh(), *layers(nn.Sigmoid())), "Sigmoid"),
    "nothing else": (lambda: nn.Sigmoid(), "Sigmoid"),
}


def batch(size=1):
    return torch.randn(5, 6, requires_grad=True), torch.randint(max(2, size), (5,))


@pytest.mark.parametrize("where", ["predictors", "adversaries"])
@pytest.mark.parametrize("case", ENDING)
def test_a_head_that_gives_probabilities_has_no_cross_entropy(case, where):
    make, kind = ENDING[case]
    heads = AdversarialHeads(6, **{where: {"domain": make()}})
    x, target = batch()
    with pytest.raises(ValueError) as caught:
        heads(x, {"domain": target})
    assert str(caught.value) == (
        f"head 'domain' ends in a {kind}, but heads give logits, from which the cross entropy makes probabilities "
        f"itself: leave out the {kind}"
    )
    assert heads(x)["domain"].shape[0] == 5  # as it is, for a loss of one's own


def test_compiled_heads_refuse_it_too():
    heads = AdversarialHeads(6, adversaries={"domain": nn.Sequential(*layers(nn.Sigmoid()))})
    x, target = batch()
    # Not fullgraph, where Dynamo of torch 2.8 says that there is an error and not which.
    with pytest.raises(ValueError, match=r"^head 'domain' ends in a Sigmoid, but heads give logits"):
        torch.compile(heads, backend="eager")(x, {"domain": target})


def test_a_binary_cross_entropy_for_each_output_takes_logits_too():
    heads = AdversarialHeads(6, {"tags": nn.Sequential(*layers(nn.Sigmoid(), size=3))}, losses={"tags": "bce"})
    with pytest.raises(ValueError, match=r"^head 'tags' ends in a Sigmoid, but heads give logits"):
        heads(torch.randn(5, 6), {"tags": torch.randint(2, (5, 3))})


def mean_distance(logits, targets):
    return (logits[:, 0] - targets).abs()


@pytest.mark.parametrize("loss, expected", [("mse", F.mse_loss), (mean_distance, F.l1_loss)], ids=["mse", "function"])
def test_a_squared_error_and_a_loss_of_ones_own_may_have_a_sigmoid(loss, expected):
    heads = AdversarialHeads(6, {"share": nn.Sequential(*layers(nn.Sigmoid()))}, losses={"share": loss})
    x, values = torch.randn(5, 6), torch.rand(5)
    torch.testing.assert_close(heads(x, {"share": values}).loss, expected(heads(x)["share"][:, 0], values))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(*layers(nn.LogSoftmax(-1), size=3)),
        nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        nn.Sequential(nn.Softmax(-1), nn.Linear(6, 3)),
        nn.Sequential(*layers(nn.Tanh(), size=3)),
    ],
    ids=["LogSoftmax", "Sigmoid inside", "Softmax inside", "Tanh"],
)
def test_other_endings_and_activations_inside_are_taken(module):
    x, target = batch(3)
    loss = AdversarialHeads(6, {"digit": module})(x, {"digit": target}).loss
    torch.testing.assert_close(loss, F.cross_entropy(module(x), target))


# --- probabilities ---------------------------------------------------------------------------------------------------

TEXT = "targets[{}] must be probabilities, which sum to 1 in each row; for several labels at once use {}, got {}"
MULTI_HOT = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])

# How a head is run.
MODULES = {
    "linear": lambda size: nn.Linear(6, size),
    "wide": lambda size: nn.Linear(6, 64 if size > 1 else 1),  # by matrix products
    "layers": lambda size: nn.Sequential(*layers(size=size)),
    "last layer": lambda size: nn.Sequential(nn.Tanh(), nn.Linear(6, size)),
    "as given": lambda size: nn.Sequential(nn.Linear(6, size), nn.Tanh()),
}


def wide(target, like):
    return F.pad(target, (0, like - target.shape[1]))


def case(run, target, dtype=torch.float32, **options):
    module = MODULES[run](target.shape[1]).to(dtype)
    heads = AdversarialHeads(6, adversaries={"tags": module})
    x = torch.randn(4, 6, dtype=dtype)
    target = wide(target, heads(x)["tags"].shape[1]).to(dtype)
    return module, x, target, heads(x, {"tags": target}, **options).loss


@pytest.mark.parametrize("run", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_several_labels_at_once_are_no_probabilities(run, dtype):
    with pytest.raises(ValueError) as caught:
        case(run, MULTI_HOT, dtype)
    assert str(caught.value) == TEXT.format("'tags'", "losses={'tags': \"bce\"}", "a row that sums to 2")


@pytest.mark.parametrize("run", MODULES)
@pytest.mark.parametrize(
    "row, got",
    [
        ([0.0, 0.0, 0.0], "a row that sums to 0"),
        ([1.5, -0.5, 0.0], "1.5"),
        ([0.5, 0.25, 0.0], "a row that sums to 0.75"),
    ],
    ids=str,
)
def test_other_rows_that_are_no_probabilities(run, row, got):
    with pytest.raises(ValueError) as caught:
        case(run, torch.tensor([row, *[[1.0, 0.0, 0.0]] * 3]))
    assert str(caught.value) == TEXT.format("'tags'", "losses={'tags': \"bce\"}", got)


@pytest.mark.parametrize("value", [2.0, -1.0, float("nan")])
def test_the_probability_of_a_binary_head_is_in_its_range(value):
    for run in MODULES:
        with pytest.raises(ValueError) as caught:
            case(run, torch.tensor([[0.0], [0.5], [1.0], [value]]))
        assert str(caught.value) == f"targets['tags'] must be probabilities, in [0, 1], got {value:g}"


@pytest.mark.parametrize("run", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rounded_probabilities_are_taken(run, dtype):
    many = torch.randn(4, 500).softmax(1).to(dtype).reshape(4, 10, 50).float().sum(2)  # sums of rounded numbers
    for target in (many, torch.tensor([[0.33, 0.33, 0.33]] * 4), torch.eye(3)[[0, 1, 2, 0]] * 0.9 + 0.1 / 3):
        module, x, target, loss = case(run, target, dtype)
        log_probabilities = module(x).to(torch.promote_types(dtype, torch.float32)).log_softmax(1)
        expected = -(target.to(log_probabilities.dtype) * log_probabilities).sum(1).mean()
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("run", MODULES)
@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_weight_0_may_hold_anything(run, size):
    target = torch.full((4, size), 1 / size)
    target[1], target[3] = float("nan"), 7.0
    *_, loss = case(run, target, sample_weight=torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert loss.isfinite()


@pytest.mark.parametrize("run", MODULES)
def test_values_of_a_squared_error_are_any(run):
    module = MODULES[run](3)
    heads = AdversarialHeads(6, {"tags": module}, losses={"tags": "mse"})
    x = torch.randn(4, 6)
    target = wide(MULTI_HOT, heads(x)["tags"].shape[1])
    torch.testing.assert_close(heads(x, {"tags": target}).loss, F.mse_loss(module(x), target))


@pytest.mark.parametrize("run", MODULES)
def test_bce_takes_the_several_labels_that_the_error_names_it_for(run):
    module = MODULES[run](3)
    heads = AdversarialHeads(6, {"tags": module}, losses={"tags": "bce"})
    x = torch.randn(4, 6)
    target = wide(MULTI_HOT, heads(x)["tags"].shape[1])
    expected = F.binary_cross_entropy_with_logits(module(x), target)
    torch.testing.assert_close(heads(x, {"tags": target}).loss, expected)


def test_the_function_says_it_by_number():
    x, weight = torch.randn(4, 6), [torch.randn(2, 6), torch.randn(3, 6)]
    with pytest.raises(ValueError) as caught:
        heads_loss(x, weight, None, [torch.zeros(4, dtype=torch.int64), MULTI_HOT], lambda_=[None, 0.5])
    assert str(caught.value) == TEXT.format(1, 'losses=[..., "bce"]', "a row that sums to 2")
    layers = [[torch.randn(5, 6), torch.randn(3, 5)], torch.randn(2, 6)]
    with pytest.raises(ValueError) as caught:
        heads_loss(x, layers, None, [MULTI_HOT, torch.zeros(4, dtype=torch.int64)], lambda_=[None, 0.5])
    assert str(caught.value) == TEXT.format(0, 'losses=[..., "bce"]', "a row that sums to 2")


@pytest.mark.parametrize("run", MODULES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_compiled_graph_asserts_it_when_it_runs(run, size):
    good = torch.full((4, size), 1 / size)
    bad = good.clone()
    bad[2] = 3.0
    heads = AdversarialHeads(6, adversaries={"tags": MODULES[run](size)})
    x = torch.randn(4, 6)
    like = heads(x)["tags"].shape[1]
    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, {"tags": wide(good, like)}).loss, heads(x, {"tags": wide(good, like)}).loss)
    with pytest.raises(RuntimeError, match=re.escape("targets['tags'] must be probabilities")):
        compiled(x, {"tags": wide(bad, like)})
