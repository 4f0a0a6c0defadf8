"""The examples in the docstrings, the README and the pages in docs/ run as they stand, what they print is what they
say, and their links lead somewhere."""

import doctest
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import grl_ext
from grl_ext import functional, heads, modules, schedules, testing

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]

WORDS = 1000  # of the README: what a reader with three minutes reads

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


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "layer.md"], ids=lambda page: page.name)
def test_the_pages_equivalent_is_equivalent(page):
    (code,) = re.findall(r"```python\n(import torch\n+class GradientReversal.*?)```", page.read_text(), re.DOTALL)
    names = {}
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
    """(the heading that it stands under, code) of each Python block."""
    blocks, heading = [], page.stem
    pattern = r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$"
    for match in re.finditer(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
        if match["heading"]:
            heading = match["heading"]
        else:
            blocks.append((heading, match["code"]))
    return blocks


# Packages that the tests' environment is without. `make frameworks` has an environment with them, and runs what needs
# one: tests/frameworks/.
FRAMEWORKS = ("accelerate", "ignite", "lightning", "skorch", "transformers")


def needs_framework(code: str) -> bool:
    return re.search(rf"^(from|import) ({'|'.join(FRAMEWORKS)})\b", code, re.MULTILINE) is not None


# Pages that say so: their first block is what the others begin with.
CONTINUED = ("frameworks", "porting")


def pasted(page: Path) -> list[tuple[str, str]]:
    """What a reader pastes: each block, and where the page has a beginning that too."""
    blocks = python_blocks(page)
    if page.stem not in CONTINUED:
        return blocks
    return [(heading, blocks[0][1] + code) for heading, code in blocks[1:]]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=f"{page.stem}: {heading}")
        for page in [README, *PAGES, *OTHERS]
        for heading, code in pasted(page)
        if not needs_framework(code)
    ],
)
def test_each_block_runs_as_it_is_pasted(tmp_path, monkeypatch, code):
    # A file of its own, which gets nothing from the test. In this process, because importing PyTorch takes seconds.
    file = tmp_path / "pasted.py"
    file.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_the_blocks_are_found():
    found = {page.name: len(python_blocks(page)) for page in [README, *PAGES]}
    assert found["README.md"] == 3 and found["tutorial.md"] == 2 and found["recipes.md"] >= 20


def test_only_the_snippets_that_make_frameworks_runs_are_left_out():
    left_out = [
        (page.name, heading) for page in PAGES for heading, code in python_blocks(page) if needs_framework(code)
    ]
    headings = ["Lightning", "The Trainer of transformers", "accelerate", "ignite", "skorch"]
    assert left_out == [("frameworks.md", heading) for heading in headings]


@pytest.mark.once
def test_the_readme_is_of_one_page():
    assert len(README.read_text().split()) <= WORDS


@pytest.mark.once
def test_every_picture_has_a_text_for_those_who_do_not_see_it():
    for page in [README, *PAGES, *OTHERS]:
        for text, file in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", page.read_text()):
            assert len(text.split()) >= 8, f"{page.name}: {file}"


@pytest.mark.once
def test_each_page_is_in_one_list_of_the_index():
    lists = re.findall(
        r"^```{toctree}\n(?::[^\n]*\n)+\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.DOTALL | re.MULTILINE
    )
    listed = [name for names in lists for name in names.split()]
    assert sorted(listed) == [page.stem for page in PAGES if page.stem != "index"]


@pytest.mark.once
def test_the_reference_has_each_public_name():
    reference = (ROOT / "docs" / "api.md").read_text()
    found = set(re.findall(r"^\.\. auto\w+:: (?:grl_ext\.)?([\w.]+)$", reference, re.MULTILINE))
    functions = {f"schedules.{name}" for name in ("constant", "dann", "linear", "warm_start")} | {"testing.reverses"}
    assert found == set(grl_ext.__all__) | functions


@pytest.mark.once
def test_what_make_is_asked_for_is_a_target():
    targets = set(re.findall(r"^([\w-]+)(?= |:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [README, *PAGES, *OTHERS]:
        # In code only: `make test`, or a line that begins with it.
        for target in re.findall(r"(?:`|^)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


@pytest.mark.once
def test_the_tree_is_the_present_one():
    tree = re.search(r"^## The tree\n\n```\n(.*?)^```", OTHERS[0].read_text(), re.DOTALL | re.MULTILINE)[1]
    for path in re.findall(r"(?:^|   )((?:csrc|grl_ext|tests|bench|docs|examples)/[\w./]*)", tree, re.MULTILINE):
        assert (ROOT / path).exists(), path
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_")) and any(tracked(path))
    }
    assert folders == set(re.findall(r"^(\w+)/", tree, re.MULTILINE))


def tracked(folder: Path) -> list[str]:
    """Its files that are part of the project; what a build leaves is not."""
    command = ["git", "ls-files", "--", str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a git repository")
    return found.stdout.split()


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [README, *PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page):
    headings = {}
    for target in [README, *PAGES, *OTHERS]:
        titles = re.findall(r"^#+ (.*)$", without_code(target), re.MULTILINE)
        headings[target.resolve()] = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    text = re.sub(r"`[^`\n]*`", "", without_code(page))  # in `heads["digit"](features)` there is no link
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page.resolve()
        assert target.exists(), link
        assert not anchor or anchor in headings[target], link
