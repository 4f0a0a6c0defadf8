"""setuptools as a build backend that first looks which torch the package is built for.

What it finds decides what setup.py compiles, the wheel's version and its torch requirement. Where torch is a CUDA build
and the machine has no CUDA toolkit, it asks the installer for the packages that make one up. torch itself is only read
here, not imported.

GRL_EXT_BUILD=auto (default)   CUDA kernels too, if torch is a CUDA build and its toolkit is found or can be fetched
              cuda             the same, or an error that says what is missing
              cpu              CPU kernels only
              python           nothing compiled: the pure PyTorch path
CUDA_HOME                      the CUDA toolkit, where it is not found by itself
GRL_EXT_REPOSITORY             the address of the repository, for the links on a package page

`python build_backend.py` prints the packages that make up the CUDA toolkit for the torch of this Python, or nothing if
there are none.
"""

import ast
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

ROOT = Path(__file__).parent
SYSTEM_TOOLKITS = Path("/usr/local")
OLDEST_TORCH = (2, 8)

# nvcc's own requirements name no version, so all are named here. They unpack into one folder, which is then a complete
# toolkit.
TOOLKIT_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
FIRST_CUDA_WITH_PACKAGES = 13  # the packages of CUDA 12 lack nvcc


def fail(problem: str):
    raise SystemExit(f"grl_ext: {problem}")


def say(line: str) -> None:
    print(f"grl_ext: {line}", file=sys.stderr)


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = re.findall(r"\d+", self.version)[:2]
        return int(major), int(minor)

    @property
    def toolkit_packages(self) -> list[str]:
        if self.cuda is None or int(self.cuda.split(".")[0]) < FIRST_CUDA_WITH_PACKAGES:
            return []
        return [f"{package}=={self.cuda}.*" for package in TOOLKIT_PACKAGES]


@dataclass(frozen=True)
class Plan:
    """What is built: with `torch`, something compiled; with `toolkit`, CUDA kernels too. `reason` says why not more."""

    torch: Torch | None = None
    toolkit: Path | None = None
    reason: str = ""


def wanted_build() -> str:
    wanted = os.environ.get("GRL_EXT_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "python"):
        fail(f"GRL_EXT_BUILD is '{wanted}'; it can be auto, cuda, cpu or python.")
    return wanted


def uncompilable() -> str:
    """Why nothing can be compiled on this system; empty where it can."""
    return "Windows has the pure PyTorch path only" if sys.platform == "win32" else ""


def see_target_environment() -> None:
    """Under build isolation the paths of the environment that is installed into are still known to sysconfig."""
    sys.path += [p for p in {sysconfig.get_paths()[k] for k in ("platlib", "purelib")} if p not in sys.path]


def find_torch() -> Torch | None:
    see_target_environment()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return Torch(version["__version__"], version["cuda"])


def toolkit_candidates(torch: Torch) -> Iterator[Path]:
    """Folders where a CUDA toolkit may be, the most deliberate choice first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    for folder in sys.path:
        yield Path(folder) / "nvidia" / f"cu{torch.cuda.split('.')[0]}"
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    yield SYSTEM_TOOLKITS / "cuda"
    yield from sorted(SYSTEM_TOOLKITS.glob("cuda-*"), reverse=True)


def is_toolkit(home: Path) -> bool:
    """The nvcc on the PATH may be a wrapper, far from any headers."""
    headers = [home / "include" / "cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h")]
    return (home / "bin" / "nvcc").exists() and any(header.exists() for header in headers)


def nvcc_version(home: Path) -> str:
    said = subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True)
    return re.search(r"release (\d+\.\d+)", said)[1]


# Code for a GPU runs on later ones of its generation: 8.6 on Ada, which is 8.9, and 12.0 on all of the RTX 50.
CUDA_ARCHS = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def default_archs(home: Path) -> str:
    """Those of CUDA_ARCHS that the toolkit compiles for. The newest is PTX too, which newer GPUs compile when it is
    loaded."""
    said = subprocess.check_output([home / "bin" / "nvcc", "--list-gpu-arch"], text=True)
    known = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in said.split()]
    return ";".join(known) + "+PTX"


def find_toolkit(torch: Torch) -> tuple[Path | None, str]:
    """A toolkit of torch's major version of CUDA, or None and what stands in the way, with its remedy."""
    if torch.cuda is None:
        return None, f"torch {torch.version} is not a CUDA build; install one that is"
    problem = ""
    for home in filter(is_toolkit, toolkit_candidates(torch)):
        version = nvcc_version(home)
        if version.split(".")[0] == torch.cuda.split(".")[0]:
            return home, ""
        problem = (
            problem
            or f"nvcc in {home} is {version} but torch was built for CUDA {torch.cuda}; "
            "set CUDA_HOME to a matching toolkit"
        )
    if problem:
        return None, problem
    asked = (
        f" (CUDA_HOME={os.environ['CUDA_HOME']} has no bin/nvcc or no headers)" if os.environ.get("CUDA_HOME") else ""
    )
    remedy = f"install the one for CUDA {torch.cuda} or set CUDA_HOME to its folder"
    if torch.toolkit_packages:
        remedy = "pip install " + " ".join(f"'{package}'" for package in torch.toolkit_packages)
    return None, f"no CUDA toolkit was found{asked}; {remedy}"


def name_cudart(libraries: list[str], folders: list[str]) -> list[str]:
    """The packages have libcudart.so.13 without the link libcudart.so: the linker must ask for the file by its own
    name."""
    if any(Path(folder, "libcudart.so").exists() for folder in folders):
        return libraries
    files = [file.name for folder in folders for file in sorted(Path(folder).glob("libcudart.so.*"))]
    return [f":{files[0]}" if library == "cudart" and files else library for library in libraries]


def make_plan() -> Plan:
    """What GRL_EXT_BUILD, the torch and the toolkit here come to; ends the build where they do not fit."""
    wanted = wanted_build()
    if wanted == "python":
        return Plan(reason="GRL_EXT_BUILD=python")
    if reason := uncompilable():
        if wanted != "auto":
            fail(f"GRL_EXT_BUILD={wanted}, but {reason}.")
        return Plan(reason=reason)
    torch = find_torch()
    if torch is None:
        fail(
            "building needs the torch it will run with, and there is none. Install torch first and use "
            "pip install --no-build-isolation, or set GRL_EXT_BUILD=python for the pure PyTorch path."
        )
    if torch.release < OLDEST_TORCH:
        fail(f"torch {torch.version} is too old: {'.'.join(map(str, OLDEST_TORCH))} or later is needed.")
    toolkit, obstacle = (None, "GRL_EXT_BUILD=cpu") if wanted == "cpu" else find_toolkit(torch)
    if wanted == "cuda" and obstacle:
        fail(f"GRL_EXT_BUILD=cuda, but {obstacle}.")
    return Plan(torch, toolkit, obstacle)


def check_compiler() -> None:
    """PyTorch compiles with $CXX or c++, setuptools links with $CXX or Python's own compiler."""
    own = sysconfig.get_config_var("CXX") or "c++"
    for command in (os.environ.get("CXX") or "c++", os.environ.get("CXX") or own):
        program = command.split()[0]
        if shutil.which(program) is None:
            fail(
                f"building needs a C++ compiler, and there is no {program}. Install one (g++) or name it in CXX, "
                "or set GRL_EXT_BUILD=python for the pure PyTorch path, which needs none."
            )


def precompile(header: Path, flags: list[str], folder: Path) -> Path | None:
    """Precompiles the header for sources that are compiled with these flags, and returns the folder to put first among
    those of headers.

    None where the compiler does not look there (clang), or cannot: the sources then read the header itself.
    """
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    said = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    if "clang" in said:
        return None
    folder = folder / "precompiled"
    folder.mkdir(parents=True, exist_ok=True)
    result, stamp = folder / f"{header.name}.gch", folder / "stamp"
    command = [*cxx, *flags, "-x", "c++-header", str(header), "-o", str(result)]
    state = "\n".join((said, *command, header.read_text()))
    if stamp.exists() and stamp.read_text() == state:
        return folder
    say("precompiling PyTorch's headers")
    if subprocess.run(command, capture_output=True).returncode:
        return None
    stamp.write_text(state)
    return folder


def release() -> str:
    """The version, which stands in the package and nowhere else."""
    for node in ast.parse((ROOT / "grl_ext" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    fail("grl_ext/__init__.py has no __version__.")


def version(plan: Plan) -> str:
    """The release, with the torch and the kernels that it was built for: 0.2.0+pt213cpu, 0.2.0+pt211cu130.

    A wheel from an sdist keeps the sdist's version, as installers demand. Its torch requirement says the same.
    """
    if plan.torch is None or (ROOT / "PKG-INFO").exists():
        return release()
    major, minor = plan.torch.release
    return f"{release()}+pt{major}{minor}" + (f"cu{plan.torch.cuda.replace('.', '')}" if plan.toolkit else "cpu")


def torch_requirement(plan: Plan) -> str:
    """What was compiled for one torch must not meet another; plain Python code need not care."""
    if plan.torch is None:
        return f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    major, minor = plan.torch.release
    return f"torch=={major}.{minor}.*"


def package_page() -> dict:
    """setup()'s arguments for a package page: the README, and links into the repository if GRL_EXT_REPOSITORY says
    where that is.

    A package page has no tree beside it, so there the README's links into the tree lead to this release in the
    repository.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    urls = {}
    if repository := os.environ.get("GRL_EXT_REPOSITORY", "").rstrip("/"):

        def absolute(link: re.Match) -> str:
            kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
            return f"]({repository}/{kind}/v{release()}/{link[1]})"

        parts = re.split(
            r"(```.*?```|`[^`\n]*`)", readme, flags=re.DOTALL
        )  # code, which has brackets of its own, at the odd places
        parts[::2] = [re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", absolute, part) for part in parts[::2]]
        readme = "".join(parts)
        urls = {
            "Source": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/v{release()}/CHANGELOG.md",
        }
    return {"long_description": readme, "long_description_content_type": "text/markdown", "project_urls": urls}


def missing_toolkit_packages() -> list[str]:
    """What the installer must fetch before the build. Every problem is left to the build, which has the words for
    it."""
    if wanted_build() not in ("auto", "cuda") or uncompilable():
        return []
    torch = find_torch()
    if torch is None or not torch.toolkit_packages or find_toolkit(torch)[0]:
        return []
    say(
        f"torch {torch.version} is a CUDA build and no CUDA toolkit is here: "
        f"fetching {', '.join(torch.toolkit_packages)} for this build "
        "(GRL_EXT_BUILD=cpu does without)"
    )
    return torch.toolkit_packages


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + missing_toolkit_packages()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + missing_toolkit_packages()


if __name__ == "__main__":
    if wanted_build() in ("auto", "cuda") and (here := find_torch()):
        print(*here.toolkit_packages, sep="\n", end="\n" if here.toolkit_packages else "")
