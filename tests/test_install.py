"""What setup.py says and builds, short of compiling: `make test` itself is the test of the compiled build."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("GRL_EXT_BUILD", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def build_ext(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """setup.py up to the point where it knows what it would compile."""
    return run("setup.py", "--quiet", "build", "--build-base", str(tmp_path), "--help", **variables)


def only_message(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_unknown_build_kind_is_refused_in_one_sentence(tmp_path):
    message = only_message(build_ext(tmp_path, GRL_EXT_BUILD="gpu"))
    assert message == "grl_ext: GRL_EXT_BUILD is 'gpu'; it can be auto, cuda, cpu or python."


def test_missing_torch_is_named_with_the_remedy(tmp_path):
    # A torch that cannot be imported stands for one that is not there.
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    message = only_message(build_ext(tmp_path, PYTHONPATH=str(tmp_path)))
    assert "building needs the torch it will run with" in message
    assert "--no-build-isolation" in message and "GRL_EXT_BUILD=python" in message


def test_an_old_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.10.1'\n")
    assert only_message(build_ext(tmp_path, PYTHONPATH=str(tmp_path))) == (
        "grl_ext: torch 2.10.1 is too old: 2.11 or later is needed."
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA: this one has it")
def test_cuda_build_without_a_cuda_torch_says_so(tmp_path):
    message = only_message(build_ext(tmp_path, GRL_EXT_BUILD="cuda"))
    assert message == f"grl_ext: GRL_EXT_BUILD=cuda, but torch {torch.__version__} is not a CUDA build; install one that is."


FAKE_CUDA_TORCH = "class version:\n    cuda = '12.8'\n__version__ = '2.13.0'\n"


def test_cuda_home_without_headers_is_noticed(tmp_path):
    (tmp_path / "torch.py").write_text(FAKE_CUDA_TORCH)
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch()
    variables = {"PYTHONPATH": str(tmp_path), "CUDA_HOME": str(home), "GRL_EXT_BUILD": "cuda", "PATH": os.defpath}
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("a toolkit in the usual folder is found instead")
    assert f"CUDA_HOME={home} has no bin/nvcc or no headers" in only_message(build_ext(tmp_path, **variables))


def test_nvcc_of_another_major_version_is_named(tmp_path):
    (tmp_path / "torch.py").write_text(FAKE_CUDA_TORCH)
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.1'\n")
    nvcc.chmod(0o755)
    message = only_message(build_ext(tmp_path, PYTHONPATH=str(tmp_path), CUDA_HOME=str(home), GRL_EXT_BUILD="cuda"))
    assert f"nvcc in {home} is 11.4 but torch was built for CUDA 12.8; set CUDA_HOME to a matching toolkit" in message


def test_sdist_holds_everything_a_build_needs_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not needed')\n")
    result = run("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    for folder, pattern in (("csrc", "**/*"), ("grl_ext", "*.py"), ("tests", "**/*.py"), ("bench", "*.py")):
        wanted = {str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern) if p.is_file() and "__pycache__" not in str(p)}
        assert wanted <= names, wanted - names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names


def test_python_only_install_works_and_is_silent(tmp_path):
    # A copy, because a build writes beside its sources.
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_text((ROOT / name).read_text())
    (source / "grl_ext").mkdir()
    for file in (ROOT / "grl_ext").glob("*.py"):
        (source / "grl_ext" / file.name).write_text(file.read_text())
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target))
    result = run("-m", "pip", "install", *options, str(source), cwd=tmp_path, GRL_EXT_BUILD="python")
    assert result.returncode == 0, result.stderr
    code = "import warnings; warnings.simplefilter('error'); import grl_ext, torch; print(grl_ext.GRL(0.5)(torch.ones(2)))"
    used = run("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0 and used.stderr == "" and "tensor([1., 1.])" in used.stdout, used.stderr
