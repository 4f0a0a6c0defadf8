"""A short run of the fuzzer; `make fuzz COUNT=100000` is the long one."""

import fuzz
import pytest

pytestmark = pytest.mark.sanitized


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_random_programs_do_as_in_plain_pytorch(path, kind):
    for seed in range(200):
        found = fuzz.check(kind, seed)
        assert found is None, f"{kind} program {seed}: {found}"


def test_a_missing_reversal_is_found(monkeypatch):
    monkeypatch.setattr(fuzz.OURS, "gradient_reversal", lambda x, lambda_=1.0: x.view_as(x))
    assert sum(fuzz.check("autograd", seed) is not None for seed in range(100)) > 30
