"""What docs/porting.md says of a package that may be installed, tried with the package itself."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import grl_ext
from grl_ext.testing import reverses

PAGE = Path(__file__).parents[2] / "docs" / "porting.md"


def class_of_the_page(name: str) -> type:
    (code,) = re.findall(rf"^(class {name}\(.*?)\n\n\n", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"grl_ext": grl_ext}
    exec(code, names)
    return names[name]


def test_the_layer_of_pytorch_adapt():
    layers = pytest.importorskip("pytorch_adapt.layers")
    theirs, ours = layers.GradientReversal(weight=0.3), class_of_the_page("GradientReversal")(weight=0.3)
    for new_weight in (0.3, 0.75):
        gradients = []
        for layer in (theirs, ours):
            layer.update_weight(new_weight)
            x = torch.linspace(-1, 1, 7).requires_grad_()
            layer(x).sin().sum().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)
        torch.testing.assert_close(ours.weight.float(), theirs.weight)
    ours.load_state_dict({"lambda_": theirs.state_dict()["weight"].reshape(())})
    assert ours.lambda_.item() == 0.75
    assert reverses(theirs, torch.ones(3, 4)) and reverses(ours, torch.ones(3, 4))
    with pytest.raises(ValueError, match="contains the layer GradientReversal, but"):
        grl_ext.AdversarialHeads(4, adversaries={"domain": nn.Sequential(theirs, nn.Linear(4, 2))})


def test_the_hooks_of_pytorch_adapt_take_the_layer(monkeypatch):
    dann = pytest.importorskip("pytorch_adapt.hooks.dann")
    monkeypatch.setattr(dann, "GradientReversal", class_of_the_page("GradientReversal"))
    features = torch.ones(3, 4, requires_grad=True)
    hook = dann.GradientReversalHook(weight=0.25, apply_to=["src_imgs_features"])
    outputs = hook({"src_imgs_features": features})[0]
    outputs["src_imgs_features"].sum().backward()
    assert torch.equal(features.grad, torch.full((3, 4), -0.25))


def test_the_layer_of_pytorch_revgrad_is_refused_inside_an_adversary():
    revgrad = pytest.importorskip("pytorch_revgrad")
    with pytest.raises(ValueError, match="contains the layer RevGrad, but"):
        grl_ext.AdversarialHeads(4, adversaries={"domain": nn.Sequential(revgrad.RevGrad(), nn.Linear(4, 2))})
    assert reverses(revgrad.RevGrad(alpha=0.5), torch.ones(3, 4))
