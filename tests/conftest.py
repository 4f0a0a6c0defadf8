"""Fixtures of all tests: where a test runs (`device`) and through which implementation (`path`)."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from grl_ext import _backend

# The same examples in every run: a failure on one machine is a failure on all. The fixtures only choose an
# implementation, so that examples may share them.
settings.register_profile(
    "grl_ext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("grl_ext")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def require_compiled() -> None:
    """Skips where nothing is compiled; fails instead if GRL_EXT_REQUIRE_COMPILED=1 says that something should be."""
    if _backend.C is None:
        missing = f"no compiled extension: {_backend.why_not}"
        pytest.fail(missing) if os.environ.get("GRL_EXT_REQUIRE_COMPILED") == "1" else pytest.skip(missing)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def compiled():
    """The compiled module."""
    require_compiled()
    return _backend.C


@pytest.fixture(params=["compiled", "fallback"])
def path(request, monkeypatch) -> str:
    """Which implementation `grl_ext` uses during the test."""
    if request.param == "compiled":
        require_compiled()
    else:
        monkeypatch.setattr(_backend, "C", None)
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
