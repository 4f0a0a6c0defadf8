"""The README's blocks pass mypy and pyright in strict mode as they are pasted, and a mistake in one does not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WRONG = """\
import grl_ext

grl_ext.GRL().lambda_ = 'a'
grl_ext.GRLLinear(2, 2)(1.0)
grl_ext.schedules.dann('a')
"""

# What the pages in docs/ and the docstrings say to write.
WRITTEN = """\
import torch

import grl_ext
from grl_ext.testing import reverses

features = torch.ones(2, 1764)
labels = torch.zeros(2, dtype=torch.int64)
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


def readme() -> list[str]:
    """The blocks that use grl_ext; the one that shows what it is equivalent to has no types."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    mine = [block for block in blocks if "grl_ext." in block]
    assert len(mine) >= 2
    return mine


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
def test_the_readmes_blocks_pass_and_wrong_types_are_found(tmp_path, check):
    right = [tmp_path / f"right{i}.py" for i in range(len(readme()))]
    written, wrong = tmp_path / "written.py", tmp_path / "wrong.py"
    for file, block in zip(right, readme(), strict=True):
        file.write_text(block)
    written.write_text(WRITTEN)
    wrong.write_text(WRONG)
    found = check([*right, written, wrong])  # in one run: reading PyTorch's types takes most of it
    for file in right:
        lines = file.read_text().splitlines()
        wrong_lines = [lines[line - 1] for name, line in found if name == file.name]
        # PyTorch's own backward() and step() have no types, nor have optimizers what they take.
        assert [line for line in wrong_lines if not re.search(r"\.backward\(\)|optimizer", line)] == []
    assert [WRITTEN.splitlines()[n - 1] for name, n in found if name == written.name] == []
    first = WRONG.count("\n") - 2
    assert {line for name, line in found if name == wrong.name} == {first, first + 1, first + 2}


def test_the_package_says_that_it_is_typed():
    import grl_ext

    assert (Path(grl_ext.__file__).parent / "py.typed").exists()
