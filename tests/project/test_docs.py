"""The examples in the docstrings, the README and the pages in docs/ run, and what they print is what they say."""

import doctest
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import grl_ext
from grl_ext import functional, heads, modules, schedules, testing

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("module", [functional, heads, modules, schedules, testing], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_run(module):
    # `torch` and `grl_ext` are what a reader has imported.
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch, "grl_ext": grl_ext})
    assert failed == 0 and tried > 0


def test_every_public_name_has_an_example():
    without = {
        "HeadsLoss",
        "HeadsOutput",
        "schedules",
        "testing",
    }  # results, and modules whose functions have their own
    for name in set(grl_ext.__all__) - without:
        assert "Example:" in getattr(grl_ext, name).__doc__, name
    for name in ("dann", "warm_start", "linear", "constant"):
        assert "Example:" in getattr(schedules, name).__doc__, name
    assert "Example:" in testing.reverses.__doc__


def test_the_readmes_equivalent_is_equivalent():
    (code,) = re.findall(r"```python\n(class GradientReversal.*?)```", README.read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    gradients = []
    for reverse in (names["GradientReversal"].apply, grl_ext.gradient_reversal):
        x = torch.linspace(-1, 1, 5).requires_grad_()
        y = reverse(x, 0.3)
        assert y.data_ptr() == x.data_ptr()
        y.sin().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def python_blocks(page: Path) -> list[tuple[str, str]]:
    """(the heading that it stands under, code) of each Python block; at their lines, so that an error shows the page's
    own."""
    blocks, heading, text = [], page.stem, page.read_text()
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$", text, re.DOTALL | re.MULTILINE
    ):
        if match["heading"]:
            heading = match["heading"]
        else:
            blocks.append((heading, "\n" * text[: match.start("code")].count("\n") + match["code"]))
    return blocks


def test_the_snippets_in_the_readme_run():
    (_, side_by_side), *blocks = python_blocks(README)
    assert "# before" in side_by_side and len(blocks) >= 5  # that one is two programs
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), grl_ext.GRL())
    names = {
        "torch": torch,
        "grl_ext": grl_ext,
        "x": torch.randn(4, 3),
        "features": torch.randn(64, 1764, requires_grad=True),
        "digits": torch.randint(10, (64,)),
        "domains": torch.randint(2, (64,)),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "total_steps": 10,
        "data": range(3),
    }
    for _, code in blocks:
        exec(compile(code, str(README), "exec"), names)


# Packages that the tests' environment is without. `make frameworks` has an environment with them, and runs what needs
# one: tests/frameworks/.
FRAMEWORKS = ("accelerate", "ignite", "lightning", "skorch", "transformers")


def needs_framework(code: str) -> bool:
    return re.search(rf"^(from|import) ({'|'.join(FRAMEWORKS)})\b", code, re.MULTILINE) is not None


# A page's first block is what the others begin with. Each of them runs by itself.
SNIPPETS = [
    pytest.param(page, first, code, id=f"{page.stem}: {heading}")
    for page in PAGES
    if (blocks := python_blocks(page))
    for (_, first), (heading, code) in [(blocks[0], block) for block in blocks[1:]]
    if not needs_framework(code)
]


@pytest.mark.parametrize("page, first, code", SNIPPETS)
def test_the_snippets_in_the_pages_run(page, first, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they save
    names = {"__name__": "snippet"}
    try:
        for part in (first, code):
            exec(compile(part, str(page), "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_the_pages_that_hold_snippets_are_found():
    found = {snippet.values[0].name for snippet in SNIPPETS}
    assert {"heads.md", "recipes.md", "frameworks.md", "porting.md"} <= found


def test_only_the_snippets_that_make_frameworks_runs_are_left_out():
    left_out = [
        (page.name, heading) for page in PAGES for heading, code in python_blocks(page) if needs_framework(code)
    ]
    headings = ["Lightning", "The Trainer of transformers", "accelerate", "ignite", "skorch"]
    assert left_out == [("frameworks.md", heading) for heading in headings]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page):
    def without_code(page: Path, also: str = "") -> str:
        return re.sub(r"^```.*?^```$" + also, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)

    headings = {}
    for target in [README, ROOT / "examples" / "README.md", *PAGES]:
        titles = re.findall(r"^#+ (.*)$", without_code(target), re.MULTILINE)
        headings[target.resolve()] = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page, also=r"|`[^`\n]*`")):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page.resolve()
        assert target.exists(), link
        assert not anchor or anchor in headings[target], link
