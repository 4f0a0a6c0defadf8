"""What is built for which torch and toolkit, and what the wheel then says: all that can be known without compiling.

`make test` itself is the test of a compiled build, `make cuda-check` that of the CUDA toolkit from packages.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # the build backend is part of the source tree, not of the package

import build_backend  # noqa: E402
from build_backend import Plan, Torch  # noqa: E402

pytestmark = pytest.mark.once


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("GRL_EXT_BUILD", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build_ext(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """setup.py up to the point where it knows what it would compile."""
    return run("setup.py", "--quiet", "build", "--build-base", str(tmp_path), "--help", **variables)


def only_message(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('only looked at, not imported')\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder


def fake_toolkit(home: Path, version: str = "13.0") -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    return home


@pytest.mark.parametrize(
    "known, archs",
    [
        ("75 80 86 87 88 89 90 100 110 103 120 121", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ("50 60 70 75 80 86 89 90", "7.5;8.0;8.6;9.0+PTX"),
    ],
    ids=["CUDA 13", "CUDA 12.4"],
)
def test_code_is_made_for_each_architecture_that_the_toolkit_has(tmp_path, known, archs):
    home = fake_toolkit(tmp_path)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    assert build_backend.default_archs(home) == archs


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """A machine on which no CUDA toolkit is found. Returns the folder of its installed packages."""
    for variable in ("GRL_EXT_BUILD", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build_backend, "SYSTEM_TOOLKITS", tmp_path / "local")
    monkeypatch.setattr(build_backend, "see_target_environment", lambda: None)
    site = tmp_path / "site-packages"
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "torch")
    return site


CUDA_13 = Torch("2.11.0+cu130", "13.0")
CUDA_12 = Torch("2.8.0+cu128", "12.8")
CPU = Torch("2.13.0+cpu", None)
PACKAGES = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]


def test_unknown_build_kind_is_refused_in_one_sentence(tmp_path):
    message = only_message(build_ext(tmp_path, GRL_EXT_BUILD="gpu"))
    assert message == "grl_ext: GRL_EXT_BUILD is 'gpu'; it can be auto, cuda, cpu or python."


def test_missing_torch_is_named_with_the_remedy(bare):
    with pytest.raises(SystemExit) as refusal:
        build_backend.make_plan()
    message = str(refusal.value)
    assert message.startswith("grl_ext: building needs the torch it will run with")
    assert "--no-build-isolation" in message and "GRL_EXT_BUILD=python" in message


def test_an_old_torch_is_refused(tmp_path):
    fake_torch(tmp_path, "2.7.1")
    assert only_message(build_ext(tmp_path, PYTHONPATH=str(tmp_path))) == (
        "grl_ext: torch 2.7.1 is too old: 2.8 or later is needed."
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA: this one has it")
def test_cuda_build_without_a_cuda_torch_says_so(tmp_path):
    message = only_message(build_ext(tmp_path, GRL_EXT_BUILD="cuda"))
    assert (
        message
        == f"grl_ext: GRL_EXT_BUILD=cuda, but torch {torch.__version__} is not a CUDA build; install one that is."
    )


def test_a_missing_compiler_is_named_with_the_remedy(tmp_path, monkeypatch):
    def sentence(program):
        return (
            f"grl_ext: building needs a C++ compiler, and there is no {program}. Install one (g++) or name it in CXX, "
            "or set GRL_EXT_BUILD=python for the pure PyTorch path, which needs none."
        )

    assert only_message(build_ext(tmp_path, GRL_EXT_BUILD="cpu", CXX="none-such -O2")) == sentence("none-such")
    assert build_ext(tmp_path, GRL_EXT_BUILD="python", CXX="none-such").returncode == 0
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as refusal:
        build_backend.check_compiler()
    assert str(refusal.value) == sentence("c++")
    (tmp_path / "c++").touch(0o755)
    monkeypatch.setattr(build_backend.sysconfig, "get_config_var", lambda name: "g++ -pthread")
    with pytest.raises(SystemExit) as refusal:
        build_backend.check_compiler()
    assert str(refusal.value) == sentence("g++")
    (tmp_path / "g++").touch(0o755)
    build_backend.check_compiler()


def test_windows_gets_the_pure_pytorch_path_and_one_line(source, monkeypatch):
    """Also without a torch: a compiler is never asked for, nor is a CUDA toolkit fetched."""
    monkeypatch.setattr(build_backend.sys, "platform", "win32")
    monkeypatch.delenv("GRL_EXT_BUILD", raising=False)
    monkeypatch.setattr(build_backend, "find_torch", lambda: CUDA_13)
    plan = build_backend.make_plan()
    assert plan == Plan(reason="Windows has the pure PyTorch path only")
    assert build_backend.torch_requirement(plan) == "torch>=2.8" and "+" not in build_backend.version(plan)
    assert build_backend.missing_toolkit_packages() == []
    for wanted in ("cpu", "cuda"):
        monkeypatch.setenv("GRL_EXT_BUILD", wanted)
        with pytest.raises(SystemExit) as refusal:
            build_backend.make_plan()
        assert str(refusal.value) == f"grl_ext: GRL_EXT_BUILD={wanted}, but Windows has the pure PyTorch path only."

    # setup.py too, with the platform faked once all that asks for the true one has been imported.
    fake = "import runpy, sys, setuptools; sys.argv = ['setup.py', 'build', '--help']; sys.platform = 'win32'; "
    result = run("-c", fake + "runpy.run_path('setup.py', run_name='__main__')", cwd=source, CXX="none-such")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "grl_ext" in line]
    assert said == ["grl_ext: no compiled extension (Windows has the pure PyTorch path only)"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_header_is_precompiled_once_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "g++")
    header, source = tmp_path / "pytorch.h", tmp_path / "source.cpp"
    header.write_text("inline int answer() { return 42; }\n")
    source.write_text("#include <pytorch.h>\nint main() { return answer(); }\n")
    folder = build_backend.precompile(header, ["-O2"], tmp_path / "temp")
    command = ["g++", "-O2", "-Winvalid-pch", "-H", f"-I{folder}", f"-I{tmp_path}", "-fsyntax-only", str(source)]
    used = subprocess.run(command, capture_output=True, text=True)
    assert used.returncode == 0 and used.stderr.startswith("! "), used.stderr  # how GCC marks what it took
    assert "precompiling" in capsys.readouterr().err
    assert build_backend.precompile(header, ["-O2"], tmp_path / "temp") == folder
    assert capsys.readouterr().err == ""
    assert build_backend.precompile(header, ["-O1"], tmp_path / "temp") == folder  # of no use to other flags
    assert "precompiling" in capsys.readouterr().err


@pytest.mark.parametrize("cxx", ["#!/bin/sh\necho 'Apple clang version 17'\n", "#!/bin/sh\nexit 1\n"])
def test_without_a_precompiled_header_the_build_goes_on(tmp_path, monkeypatch, cxx):
    (tmp_path / "cxx").write_text(cxx)
    (tmp_path / "cxx").chmod(0o755)
    (tmp_path / "pytorch.h").touch()
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    assert build_backend.precompile(tmp_path / "pytorch.h", [], tmp_path / "temp") is None


# --- which toolkit
# ---------------------------------------------------------------------------------------------------------


def test_the_torch_of_the_environment_is_read_without_importing_it(bare):
    fake_torch(bare, "2.11.0+cu130", "13.0")
    assert build_backend.find_torch() == CUDA_13


def test_a_toolkit_from_packages_is_found_beside_torch(bare):
    home = fake_toolkit(bare / "nvidia" / "cu13")
    assert build_backend.find_toolkit(CUDA_13) == (home, "")


def test_the_users_own_choice_of_toolkit_comes_first(bare, tmp_path, monkeypatch):
    on_path = fake_toolkit(tmp_path)
    assert build_backend.find_toolkit(CUDA_13) == (on_path, "")
    fake_toolkit(tmp_path / "local" / "cuda")
    packages = fake_toolkit(bare / "nvidia" / "cu13")
    assert build_backend.find_toolkit(CUDA_13) == (packages, "")
    chosen = fake_toolkit(tmp_path / "chosen", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(chosen))
    assert build_backend.find_toolkit(CUDA_13) == (chosen, "")


def test_a_toolkit_of_another_major_version_is_passed_over(bare, tmp_path):
    fake_toolkit(tmp_path / "local" / "cuda", "12.4")
    home = fake_toolkit(tmp_path / "local" / "cuda-13.0")
    assert build_backend.find_toolkit(CUDA_13) == (home, "")


def test_nvcc_of_another_major_version_is_named_if_there_is_no_other(bare, tmp_path, monkeypatch):
    home = fake_toolkit(tmp_path / "toolkit", "11.4")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build_backend.find_toolkit(CUDA_12) == (
        None,
        f"nvcc in {home} is 11.4 but torch was built for CUDA 12.8; set CUDA_HOME to a matching toolkit",
    )


def test_cuda_home_without_headers_is_noticed(bare, tmp_path, monkeypatch):
    home = fake_toolkit(tmp_path / "toolkit", "12.8")
    (home / "include" / "cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(home))
    toolkit, problem = build_backend.find_toolkit(CUDA_12)
    assert toolkit is None
    assert problem == (
        f"no CUDA toolkit was found (CUDA_HOME={home} has no bin/nvcc or no headers); "
        "install the one for CUDA 12.8 or set CUDA_HOME to its folder"
    )


def test_without_build_isolation_the_packages_to_install_are_named(bare):
    toolkit, problem = build_backend.find_toolkit(CUDA_13)
    assert toolkit is None
    assert problem == "no CUDA toolkit was found; pip install " + " ".join(f"'{package}'" for package in PACKAGES)


@pytest.mark.parametrize(
    "found, build, expected",
    [
        (CUDA_13, "auto", PACKAGES),
        (CUDA_13, "cuda", PACKAGES),
        (CUDA_13, "cpu", []),
        (CUDA_13, "python", []),
        (CUDA_12, "auto", []),  # its packages have no nvcc
        (CPU, "auto", []),
        (None, "auto", []),  # the build says what is wrong
    ],
)
def test_the_installer_is_asked_for_a_toolkit_only_where_one_is_missing(
    bare, monkeypatch, capsys, found, build, expected
):
    monkeypatch.setenv("GRL_EXT_BUILD", build)
    monkeypatch.setattr(build_backend, "find_torch", lambda: found)
    for kind in ("wheel", "editable"):
        monkeypatch.setattr(build_backend.build_meta, f"get_requires_for_build_{kind}", lambda settings: ["its own"])
        assert getattr(build_backend, f"get_requires_for_build_{kind}")() == ["its own", *expected]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (2 if expected else 0)
    assert all(
        line.startswith("grl_ext: torch 2.11.0+cu130 is a CUDA build and no CUDA toolkit is here: fetching")
        for line in said
    )

    fake_toolkit(bare / "nvidia" / "cu13")
    assert build_backend.get_requires_for_build_wheel() == ["its own"]


def test_the_linker_gets_cudart_by_the_name_that_is_there(tmp_path):
    (tmp_path / "libcudart.so.13").touch()
    folders = [str(tmp_path / "lib64"), str(tmp_path)]
    assert build_backend.name_cudart(["c10", "cudart", "torch"], folders) == ["c10", ":libcudart.so.13", "torch"]
    (tmp_path / "libcudart.so").touch()
    assert build_backend.name_cudart(["c10", "cudart", "torch"], folders) == ["c10", "cudart", "torch"]


# --- what the package says of itself
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, tag, requirement",
    [
        (Plan(CPU), "+pt213cpu", "torch==2.13.*"),
        (Plan(CUDA_13, Path("cu13")), "+pt211cu130", "torch==2.11.*"),
        (Plan(CUDA_13, reason="no toolkit"), "+pt211cpu", "torch==2.11.*"),
        (Plan(), "", "torch>=2.8"),
    ],
)
def test_a_wheel_names_the_torch_that_it_was_built_for(plan, tag, requirement):
    import grl_ext

    assert build_backend.version(plan) == grl_ext.__version__ + tag
    assert build_backend.torch_requirement(plan) == requirement


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what a build reads, because a build writes beside its sources."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "grl_ext", copy / "grl_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


@pytest.mark.parametrize("from_sdist, version", [(False, "{}+pt29cpu"), (True, "{}")])
def test_the_metadata_is_known_before_anything_is_compiled(source, tmp_path, from_sdist, version):
    import grl_ext

    if from_sdist:  # whose version an installer has read before, and insists on
        (source / "PKG-INFO").touch()
    fake_torch(tmp_path / "site", "2.9.1")
    code = f"import build_backend; print(build_backend.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    result = run("-c", code, cwd=source, PYTHONPATH=f"{source}{os.pathsep}{tmp_path / 'site'}")
    assert result.returncode == 0, result.stderr
    metadata = message_from_string((tmp_path / result.stdout.splitlines()[-1] / "METADATA").read_text())
    assert metadata["Version"] == version.format(grl_ext.__version__)
    assert "torch==2.9.*" in metadata.get_all("Requires-Dist")


def test_a_package_page_links_into_the_repository(source, tmp_path, monkeypatch):
    import grl_ext

    text = (
        "![plot](docs/a.png) and [`page`](docs/b.md), [there](https://c.org), [below](#d), `heads[0](x)`\n"
        "```python\ny[1](z)\n```\n"
    )
    (source / "README.md").write_text(text)
    monkeypatch.setattr(build_backend, "ROOT", source)
    monkeypatch.delenv("GRL_EXT_REPOSITORY", raising=False)
    assert build_backend.package_page()["long_description"] == text
    monkeypatch.setenv("GRL_EXT_REPOSITORY", "https://example.org/us/grl_ext")
    tag = f"v{grl_ext.__version__}"
    assert build_backend.package_page()["long_description"] == (
        text.replace("docs/a.png", f"https://example.org/us/grl_ext/raw/{tag}/docs/a.png").replace(
            "docs/b.md", f"https://example.org/us/grl_ext/blob/{tag}/docs/b.md"
        )
    )

    variables = {"GRL_EXT_BUILD": "python", "GRL_EXT_REPOSITORY": "https://example.org/us/grl_ext"}
    code = f"import build_backend; print(build_backend.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    result = run("-c", code, cwd=source, PYTHONPATH=str(source), **variables)
    assert result.returncode == 0, result.stderr
    metadata = message_from_string((tmp_path / result.stdout.splitlines()[-1] / "METADATA").read_text())
    assert "Source, https://example.org/us/grl_ext" in metadata.get_all("Project-URL")
    assert (
        f"/raw/{tag}/docs/a.png" in metadata.get_payload() and metadata["Description-Content-Type"] == "text/markdown"
    )


def test_sdist_holds_everything_a_build_needs_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not needed')\n")
    result = run("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    for folder, pattern in (("csrc", "**/*"), ("grl_ext", "*.py"), ("tests", "**/*.py"), ("bench", "*.py")):
        wanted = {
            str(p.relative_to(ROOT))
            for p in (ROOT / folder).glob(pattern)
            if p.is_file() and "__pycache__" not in str(p)
        }
        assert wanted <= names, wanted - names
    assert {"setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names


def test_python_only_install_works_and_is_silent(source, tmp_path):
    target = tmp_path / "target"
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target))
    result = run("-m", "pip", "install", *options, str(source), cwd=tmp_path, GRL_EXT_BUILD="python")
    assert result.returncode == 0, result.stderr
    code = (
        "import warnings; warnings.simplefilter('error'); import grl_ext, torch; print(grl_ext.GRL(0.5)(torch.ones(2)))"
    )
    used = run("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0 and used.stderr == "" and "tensor([1., 1.])" in used.stdout, used.stderr
