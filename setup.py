"""Builds grl_ext against the torch of the environment it is installed into.

GRL_EXT_BUILD=auto (default)   CUDA kernels too, if torch is a CUDA build and a matching nvcc is found
              cuda             the same, or an error that says what is missing
              cpu              CPU kernels only
              python           nothing compiled: the pure PyTorch path
TORCH_CUDA_ARCH_LIST           GPU architectures, as for any PyTorch extension; no GPU need be present
CUDA_HOME                      the CUDA toolkit, where it is not found by itself
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

# 8.0 code runs on every 8.x GPU, 9.0 is Hopper's own, and newer GPUs compile the PTX when it is loaded.
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
OLDEST_TORCH = (2, 11)


def fail(problem: str):
    raise SystemExit(f"grl_ext: {problem}")


def say(line: str) -> None:
    print(f"grl_ext: {line}", file=sys.stderr)


def import_torch():
    # Under build isolation the paths of the environment that is installed into are still known to sysconfig.
    sys.path += [p for p in {sysconfig.get_paths()[k] for k in ("platlib", "purelib")} if p not in sys.path]
    try:
        import torch
    except ImportError as error:
        fail(
            f"building needs the torch it will run with ({error}). Install torch first and use pip install --no-build-isolation, "
            "or set GRL_EXT_BUILD=python for the pure PyTorch path."
        )
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        fail(f"torch {torch.__version__} is too old: {'.'.join(map(str, OLDEST_TORCH))} or later is needed.")
    return torch


def find_cuda_home() -> Path | None:
    """A toolkit with nvcc and headers; the nvcc on the PATH may be a wrapper, far from either."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and any(home.glob("**/include/cuda_runtime.h")):
            return home
    return None


def why_no_cuda(torch) -> str | None:
    """What stands in the way of building the CUDA kernels, with its remedy; None if nothing does."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build; install one that is"
    home = find_cuda_home()
    if home is None:
        asked = f" (CUDA_HOME={os.environ['CUDA_HOME']} has no bin/nvcc or no headers)" if "CUDA_HOME" in os.environ else ""
        return f"no CUDA toolkit was found{asked}; install the one for CUDA {torch.version.cuda} or set CUDA_HOME to its folder"
    release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True))
    version = f"{release[1]}.{release[2]}"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc in {home} is {version} but torch was built for CUDA {torch.version.cuda}; set CUDA_HOME to a matching toolkit"
    os.environ["CUDA_HOME"] = str(home)
    return None


def extension():
    """(ext_modules, cmdclass, options) for what GRL_EXT_BUILD asks."""
    wanted = os.environ.get("GRL_EXT_BUILD", "auto")
    if wanted not in ("auto", "cuda", "cpu", "python"):
        fail(f"GRL_EXT_BUILD is '{wanted}'; it can be auto, cuda, cpu or python.")
    if wanted == "python":
        say("no compiled extension (GRL_EXT_BUILD=python)")
        return [], {}, {}

    torch = import_torch()
    obstacle = "GRL_EXT_BUILD=cpu" if wanted == "cpu" else why_no_cuda(torch)
    if wanted == "cuda" and obstacle:
        fail(f"GRL_EXT_BUILD=cuda, but {obstacle}.")
    # Only now: cpp_extension looks at CUDA_HOME when it is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [f for f in glob("csrc/**/*.cpp", recursive=True) if not f.startswith("csrc/cuda/")]
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # at::parallel_for is inline: without this flag it runs on one thread
    if obstacle:
        say(f"CPU kernels for torch {torch.__version__}; no CUDA kernels: {obstacle}")
        module = CppExtension("grl_ext._C", sorted(sources), extra_compile_args=[*flags, '-DGRL_EXT_CUDA_ARCHS=""'])
    else:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        say(f"CPU and CUDA kernels ({archs}) for torch {torch.__version__}")
        module = CUDAExtension(
            "grl_ext._C",
            sorted(sources + glob("csrc/cuda/*.cu")),
            extra_compile_args={
                "cxx": [*flags, "-DGRL_EXT_WITH_CUDA", f'-DGRL_EXT_CUDA_ARCHS="{archs}"'],
                "nvcc": ["-O3", "-lineinfo"],
            },
        )
    # Objects made for one torch are no good for another.
    build_base = f"build/torch-{torch.__version__}" + ("" if obstacle else "-cuda")
    return [module], {"build_ext": BuildExtension}, {"build": {"build_base": build_base}}


# Metadata and the sdist need neither torch nor a compiler.
compiling = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
ext_modules, cmdclass, options = extension() if compiling else ([], {}, {})
setup(ext_modules=ext_modules, cmdclass=cmdclass, options=options)
