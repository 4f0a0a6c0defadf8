"""Fixtures of all tests: where a test runs (`device`) and through which implementation (`path`).

Tests may run in several processes at once (`make test`: one a core, each with one thread). One that needs more threads
takes the fixture `threads`.
"""

import os
import tempfile
from collections.abc import Callable, Iterator

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

# What Inductor compiles is shared by the processes of a run, and no run takes it from another: PyTorch does not know
# when the C++ behind an operator has changed. The first process to come here is the one that starts the others.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="grl_ext_inductor_")  # removed with the process
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def require_compiled() -> None:
    """Skips where nothing is compiled; fails instead if GRL_EXT_REQUIRE_COMPILED=1 says that something should be."""
    if _backend.C is None:
        missing = f"no compiled extension: {_backend.why_not}"
        pytest.fail(missing) if os.environ.get("GRL_EXT_REQUIRE_COMPILED") == "1" else pytest.skip(missing)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.empty(0, device=request.param).device  # with its index, as messages name it


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


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
