"""A short run of the fuzzer; `make fuzz COUNT=100000` is the long one."""

import fuzz
import plain
import pytest
import torch

pytestmark = pytest.mark.sanitized


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_programs_do_as_in_plain_pytorch(path, kind):
    for seed in range(200):
        found = fuzz.check(kind, seed)
        assert found is None, f"{kind} program {seed}: {found}"


def test_a_missing_reversal_is_found(monkeypatch):
    monkeypatch.setattr(fuzz.OURS, "gradient_reversal", lambda x, lambda_=1.0: x.view_as(x))
    assert sum(fuzz.check("autograd", seed) is not None for seed in range(100)) > 30


def test_a_lambda_that_goes_by_position_is_found(monkeypatch):
    heads = fuzz.OURS.AdversarialHeads
    monkeypatch.setattr(
        heads, "_reversal_of", lambda self, name: list(self.reversals.values())[list(self.adversaries).index(name)]
    )
    monkeypatch.setattr("grl_ext.heads._Adversaries.__delitem__", torch.nn.ModuleDict.__delitem__)
    assert sum(fuzz.check("heads", seed) is not None for seed in range(200)) > 5


def test_what_a_rounding_moves_is_no_difference():
    """Programs in which plain PyTorch differs from itself as soon as its linear layers round otherwise."""
    moved = 0
    for seed in (18314, 31879, 40859):
        theirs = fuzz.KINDS["heads"].run(seed, plain.OPERATIONS)
        with fuzz.rounded_otherwise(7):
            others = fuzz.KINDS["heads"].run(seed, plain.OPERATIONS)
        moved += fuzz.difference(others, theirs) is not None
        assert fuzz.difference(others, theirs, fuzz.sensitivity("heads", seed, theirs)) is None
    assert moved > 0
