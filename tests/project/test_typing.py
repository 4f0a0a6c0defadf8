"""The README's own lines pass mypy and pyright in strict mode, and a mistake in them does not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What the README's lines take as given.
GIVEN = """\
from typing import Any

import torch
import grl_ext

x = torch.ones(2, 3)
model = torch.nn.Sequential(grl_ext.GRL())
optimizer: Any = torch.optim.SGD(model.parameters())  # PyTorch's own step() is not typed strictly
data = [x]
total_steps = 10
features = torch.ones(2, 1764)
digits = domains = torch.zeros(2, dtype=torch.int64)

"""

# What the pages in docs/ and the docstrings say to write.
WRITTEN = (
    GIVEN
    + """\
from grl_ext.testing import reverses

labels = domains
heads = grl_ext.AdversarialHeads(1764, {"digit": 10}, {"domain": [16, 2]}, lambda_=0.3, allow_reversal=["domain"])
heads.lambda_ = 0.3
heads.lambda_ = {"domain": 0.3}
heads.lambda_ = {"domain": torch.tensor(0.3)}
number = heads.lambda_["domain"].item()
heads.add_adversary("site", 3, lambda_=torch.tensor(0.1), allow_reversal=True)
logits: dict[str, torch.Tensor] = heads(features)
total: torch.Tensor = heads(features, {"digit": labels}, loss_weight={"digit": 0.5}).loss
grl_ext.heads_loss(features, [torch.ones(3, 1764)], targets=[labels], lambda_=[None])
grl_ext.heads_loss(features, [torch.ones(3, 1764)], None, [labels], lambda_=[0.5])
answer: bool = reverses(torch.nn.Linear(1764, 2), features)
layer = grl_ext.GRL(torch.tensor([0.3]))
layer.lambda_ = 0.3
"""
)

WRONG = GIVEN + "grl_ext.GRL().lambda_ = 'a'\ngrl_ext.GRLLinear(2, 2)(1.0)\ngrl_ext.schedules.dann('a')\n"


def readme() -> str:
    """The blocks of Python that stand alone: those that name grl_ext and are not two columns, before and after."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    mine = [block for block in blocks if "grl_ext." in block and "# before" not in block]
    assert len(mine) >= 2
    return GIVEN + "\n".join(mine)


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    return path


def mypy(files: list[Path]) -> list[tuple[str, int]]:
    """File and line of each error that it finds."""
    command = [tool("mypy"), "--strict", "--python-executable", sys.executable]
    command += ["--cache-dir", str(ROOT / "build" / "mypy"), *map(str, files)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=files[0].parent, env=environment)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return [(name, int(line)) for name, line in re.findall(r"^(\w+\.py):(\d+): error", result.stdout, re.MULTILINE)]


def pyright(files: list[Path]) -> list[tuple[str, int]]:
    folder = files[0].parent
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": [file.name for file in files]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    # basedpyright is pyright in a wheel that brings all it needs; pyright's own fetches itself over the network.
    command = [tool("basedpyright"), "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files), result.stdout
    errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
    return [(Path(found["file"]).name, found["range"]["start"]["line"] + 1) for found in errors]


@pytest.mark.parametrize("check", [mypy, pyright])
def test_the_readmes_lines_pass_and_wrong_types_are_found(tmp_path, check):
    right, written, wrong = (tmp_path / f"{name}.py" for name in ("right", "written", "wrong"))
    right.write_text(readme())
    written.write_text(WRITTEN)
    wrong.write_text(WRONG)
    found = check([right, written, wrong])  # in one run: reading PyTorch's types takes most of it
    lines = right.read_text().splitlines()
    # PyTorch's own backward() has no types.
    assert [lines[n - 1] for name, n in found if name == right.name and ".backward()" not in lines[n - 1]] == []
    assert [WRITTEN.splitlines()[n - 1] for name, n in found if name == written.name] == []
    first = WRONG.count("\n") - 2
    assert {n for name, n in found if name == wrong.name} == {first, first + 1, first + 2}


def test_the_package_says_that_it_is_typed():
    import grl_ext

    assert (Path(grl_ext.__file__).parent / "py.typed").exists()
