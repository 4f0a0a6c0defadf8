"""A reversal of somebody else inside an adversary: refused where a name says so, whenever it is put there."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grl_ext import AdversarialHeads, gradient_reversal
from grl_ext._foreign import says_reversal

pytestmark = pytest.mark.usefixtures("path")

ENDING = (
    ", but AdversarialHeads reverses the adversaries' gradients itself: leave that reversal out, or pass "
    "allow_reversal=True if it is none"
)


class ReverseLayerF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.alpha * grad, None


class RevGrad(nn.Module):
    def forward(self, x):
        return ReverseLayerF.apply(x, 1.0)


class Inherited(RevGrad):
    pass


def grad_reverse(x):
    return ReverseLayerF.apply(x, 1.0)


def through_a_helper(x):
    return ReverseLayerF.apply(x, 1.0)


def flipped(x):
    return x.flip(-1)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(6, 2)


class CallsFunction(Base):
    """As scGPT's: off where it says so."""

    def __init__(self, reverse_grad=True):
        super().__init__()
        self.reverse_grad = reverse_grad

    def forward(self, x):
        if self.reverse_grad:
            x = grad_reverse(x)
        return self.classifier(x)


class CallsApply(Base):
    """As skada's."""

    def forward(self, x, sample_weight=None):
        return self.classifier(ReverseLayerF.apply(x, 0.5))


class CallsHelper(Base):
    def forward(self, x):
        return self.classifier(through_a_helper(x))


class CallsMethod(Base):
    def forward(self, x):
        return self.classifier(self.turn(x))

    def turn(self, x):
        return ReverseLayerF.apply(x, 0.5)


class CallsOurs(Base):
    def forward(self, x):
        return self.classifier(gradient_reversal(x, 0.5))


class Holds(Base):
    def __init__(self, function):
        super().__init__()
        self.turned = function

    def forward(self, x):
        return self.classifier(self.turned(x))


class Harmless(Base):
    """Names that are near."""

    def __init__(self):
        super().__init__()
        self.grl_weight, self.reversed = 0.3, True

    def forward(self, x):
        order = [0, 1]
        order.reverse()
        return self.classifier(flipped(x) * self.grl_weight)[:, order]


class ReversedLSTM(Base):
    def forward(self, x):
        return self.classifier(x)


FOUND = {
    "layer": (lambda: nn.Sequential(RevGrad(), nn.Linear(6, 2)), "contains the layer RevGrad"),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Tanh(), RevGrad()), nn.Linear(6, 2)),
        "contains the layer RevGrad",
    ),
    "subclass": (lambda: nn.Sequential(Inherited(), nn.Linear(6, 2)), "contains the layer Inherited"),
    "function": (CallsFunction, "calls grad_reverse in CallsFunction.forward"),
    "apply": (CallsApply, "calls ReverseLayerF in CallsApply.forward"),
    "helper": (CallsHelper, "calls ReverseLayerF in CallsHelper.forward"),
    "method": (CallsMethod, "calls ReverseLayerF in CallsMethod.forward"),
    "ours": (CallsOurs, "calls gradient_reversal in CallsOurs.forward"),
    "held apply": (lambda: Holds(ReverseLayerF.apply), "holds ReverseLayerF as Holds.turned"),
    "held partial": (
        lambda: Holds(functools.partial(gradient_reversal, lambda_=0.3)),
        "holds gradient_reversal as Holds.turned",
    ),
    "inside another module": (
        lambda: nn.Sequential(nn.Tanh(), CallsApply()),
        "calls ReverseLayerF in CallsApply.forward",
    ),
}
TAKEN = {
    "off": lambda: CallsFunction(reverse_grad=False),
    "near names": Harmless,
    "reversed sequence": ReversedLSTM,
    "held function": lambda: Holds(flipped),
}


def make():
    return AdversarialHeads(6, {"digit": 3}, {"domain": 2}, lambda_=0.5)


@pytest.mark.parametrize("case", FOUND)
def test_it_is_refused_wherever_it_is_put(case):
    module, text = FOUND[case]
    heads = make()
    for put in (
        lambda: AdversarialHeads(6, adversaries={"domain": module()}),
        lambda: heads.add_adversary("domain", module()),
        lambda: heads.adversaries.update({"domain": module()}),
    ):
        with pytest.raises(ValueError) as caught:
            put()
        assert str(caught.value) == f"adversaries['domain'] {text}{ENDING}"
    assert type(heads.adversaries["domain"]) is nn.Linear
    AdversarialHeads(6, {"digit": module()})  # a predictor's reversal is its own


@pytest.mark.parametrize("case", [case for case in FOUND if case not in ("held apply", "held partial")])
def test_one_that_is_put_into_a_head_later_is_refused_in_the_call(case):
    module, text = FOUND[case]
    heads = make()
    heads.adversaries["domain"] = nn.Sequential(nn.Tanh(), nn.Identity(), nn.Linear(6, 2))
    heads.adversaries["domain"][1] = module()
    for arguments in ((), ({"domain": torch.zeros(4, dtype=torch.int64)},)):
        with pytest.raises(ValueError) as caught:
            heads(torch.randn(4, 6), *arguments)
        assert str(caught.value) == f"adversaries['domain'] {text}{ENDING}"
    assert "refused: adversaries['domain'] " in repr(heads)


@pytest.mark.parametrize("case", TAKEN)
def test_what_only_looks_near_is_taken(case):
    heads = AdversarialHeads(6, adversaries={"domain": TAKEN[case]()}, lambda_=0.5)
    x = torch.randn(4, 6, requires_grad=True)
    ours = torch.autograd.grad(heads(x)["domain"].sum(), x)[0]
    plain = torch.autograd.grad(heads.adversaries["domain"](x).sum(), x)[0]
    torch.testing.assert_close(ours, -0.5 * plain)


def test_who_insists_gets_it():
    x, targets = torch.randn(4, 6, requires_grad=True), {"domain": torch.zeros(4, dtype=torch.int64)}
    given = CallsApply()
    heads = make()
    with pytest.raises(ValueError, match=r"^allow_reversal names \['room'\], but the adversaries are \['domain'\]$"):
        AdversarialHeads(6, adversaries={"domain": 2}, allow_reversal=["room"])
    for insisting in (
        AdversarialHeads(6, adversaries={"domain": given}, allow_reversal=True),
        AdversarialHeads(6, adversaries={"domain": given, "room": 2}, allow_reversal=["domain"]),
        heads,
    ):
        if insisting is heads:
            heads.add_adversary("domain", given, lambda_=1.0, allow_reversal=True)
        for own in (insisting, copy.deepcopy(insisting)):
            (ours,) = torch.autograd.grad(own(x, targets).loss, x)
            (once,) = torch.autograd.grad(F.cross_entropy(given(x), targets["domain"]), x)
            torch.testing.assert_close(ours, -once)
    heads.add_adversary("domain", 2)  # which it is asked for again
    with pytest.raises(ValueError, match=r"^adversaries\['domain'\] calls ReverseLayerF"):
        heads.adversaries["domain"] = given
    with pytest.raises(ValueError, match=r"^adversaries\['room'\] contains the layer RevGrad"):
        AdversarialHeads(
            6,
            adversaries={"domain": given, "room": nn.Sequential(RevGrad(), nn.Linear(6, 2))},
            allow_reversal=["domain"],
        )


def test_heads_that_allow_one_compile():
    x, targets = torch.randn(4, 6, requires_grad=True), {"domain": torch.zeros(4, dtype=torch.int64)}
    heads = AdversarialHeads(6, adversaries={"domain": CallsApply()}, allow_reversal=True)
    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x, targets).loss, x)
    torch.testing.assert_close(ours, torch.autograd.grad(heads(x, targets).loss, x))


@pytest.mark.parametrize(
    "name",
    "ReverseLayerF GradReverse GradientReversal GradientReversalLayer RevGrad revgrad GRL GRLayer GRL_Layer grl_hook "
    "GradientReverseLayer WarmStartGradientReverseLayer Reverse ReversalLayer gradreverse GradRevLayer FlipGradient "
    "DomainReversal GradientReverseFunction GradientReversalFn GradientReverseModule RevF".split(),
)
def test_usual_spellings(name):
    assert says_reversal(name, alone=True)


@pytest.mark.parametrize(
    "name",
    "Aggregator Angrl ReversedLSTM ReversibleBlock RevIN AdversarialLayer TimeReversal ReverseComplement Gradient "
    "GradientNorm Program UpgradeReverb GraphLayer Linear".split(),
)
def test_other_names(name):
    assert not says_reversal(name, alone=True)
