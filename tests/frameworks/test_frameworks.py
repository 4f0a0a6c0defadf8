"""`docs/frameworks.md` with the real packages: a training that was saved in the middle and resumed ends with the very
weights of one that was not. `make frameworks` installs them and runs this; elsewhere what needs one is skipped."""

import importlib.util
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR

from grl_ext import LambdaScheduler, schedules

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
FRAMEWORKS = {
    "Without a framework": None,
    "Lightning": "lightning",
    "The Trainer of transformers": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite",
    "skorch": "skorch",
}

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The snippets save into the present folder. Nothing asks the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def require(package: str | None) -> None:
    if package and importlib.util.find_spec(package) is None:
        missing = f"{package} is not installed: make frameworks"
        pytest.fail(missing) if os.environ.get("GRL_EXT_REQUIRE_FRAMEWORKS") == "1" else pytest.skip(missing)


def run(heading: str) -> dict:
    """The names that the page's first block and the one under that heading leave."""
    blocks = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    sections = dict(zip(["", *blocks[1::2]], blocks[::2], strict=True))
    names = {"__name__": "snippet"}
    for section in ("", heading):
        (code,) = re.findall(r"^```python\n(.*?)^```$", sections[section], re.DOTALL | re.MULTILINE)
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), names)
    return names


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys() and any(name.endswith("lambda_") for name in one)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("heading", FRAMEWORKS)
def test_a_resumed_training_ends_with_the_same_bits(heading):
    require(FRAMEWORKS[heading])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(lambda|LambdaScheduler)")
        names = run(heading)
    whole, resumed = names["whole"], names["resumed"]
    assert whole is not resumed
    assert differing(whole, resumed) == []
    assert whole.heads.lambda_["domain"].item() == schedules.dann()(1.0)
    # Lambda has an effect that these bits show.
    names["schedule"] = schedules.constant(0.5)
    assert len(differing(whole, names["train"]())) > 3
