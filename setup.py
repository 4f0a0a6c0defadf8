"""Compiles grl_ext for the torch that build_backend.py finds; that file says what the environment variables mean.

TORCH_CUDA_ARCH_LIST           GPU architectures, as for any PyTorch extension; no GPU need be present
"""

import os
import re
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

import build_backend

ROOT = Path(__file__).resolve().parent


def extension(plan: build_backend.Plan) -> dict:
    """setup()'s arguments for what is compiled."""
    if plan.torch is None:
        build_backend.say(f"no compiled extension ({plan.reason})")
        return {}
    build_backend.check_compiler()
    if plan.toolkit:
        os.environ["CUDA_HOME"] = str(plan.toolkit)  # cpp_extension looks at it when it is imported
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    # grl_ext/_backend.py loads the one for the torch that is running.
    name = "grl_ext._C_torch{}_{}".format(*plan.torch.release)
    # Paths in error messages and assertions begin at the tree's root and at torch's package, on whatever machine they
    # were compiled.
    site = os.path.dirname(torch.__path__[0])
    here = [f"-ffile-prefix-map={folder}/=" for folder in (os.getcwd(), site)]
    sources = sorted(f for f in glob("csrc/**/*.cpp", recursive=True) if not f.startswith("csrc/cuda/"))
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", *here]
    # PyTorch's headers: of each other they include the operators they use, not all of them; their warnings are theirs.
    flags += ["-DAT_PER_OPERATOR_HEADERS", *(f"-isystem{folder}" for folder in include_paths()), f"-I{ROOT / 'csrc'}"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # at::parallel_for is inline: without this flag it runs on one thread

    class Build(BuildExtension):
        def build_extensions(self):
            args = module.extra_compile_args
            cxx_flags = args["cxx"] if isinstance(args, dict) else args
            folders = [f"-I{folder}" for folder in (*module.include_dirs, *self.compiler.include_dirs)]
            shared = [*self.compiler.compiler_so[1:], *folders, *cxx_flags]
            precompiled = build_backend.precompile(ROOT / "csrc" / "pytorch.h", shared, Path(self.build_temp).resolve())
            if precompiled:
                cxx_flags.insert(0, f"-I{precompiled}")
            super().build_extensions()
            if precompiled and not self.inplace:
                shutil.rmtree(precompiled)  # some hundred megabytes that only the next build in place would use

    if plan.toolkit:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build_backend.default_archs(plan.toolkit))
        nvcc = build_backend.nvcc_version(plan.toolkit)
        build_backend.say(
            f"CPU and CUDA kernels ({archs}) for torch {plan.torch.version}, with nvcc {nvcc} in {plan.toolkit}"
        )
        # nvcc's names for that code, by which an operation asks whether there is any for the GPU it is on.
        flags_of_archs = " ".join(cpp_extension._get_cuda_arch_flags())
        code = '-DGRL_EXT_CUDA_CODE="{}"'.format(",".join(re.findall(r"code=((?:sm|compute)_\w+)", flags_of_archs)))
        module = CUDAExtension(
            name,
            sources + sorted(glob("csrc/cuda/*.cu")),
            extra_compile_args={
                "cxx": [*flags, "-DGRL_EXT_WITH_CUDA", f'-DGRL_EXT_CUDA_ARCHS="{archs}"', code],
                "nvcc": ["-O3", *(f"-Xcompiler={flag}" for flag in here)],
            },
        )
        module.libraries = build_backend.name_cudart(module.libraries, module.library_dirs)
    else:
        build_backend.say(f"CPU kernels for torch {plan.torch.version}; no CUDA kernels: {plan.reason}")
        module = CppExtension(name, sources, extra_compile_args=[*flags, '-DGRL_EXT_CUDA_ARCHS=""'])
    # Objects made for one torch are no good for another.
    build_base = f"build/torch-{plan.torch.version}" + ("-cuda" if plan.toolkit else "")
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"build": {"build_base": build_base}},
    }


commands = set(sys.argv)
compiles = bool({"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & commands)
# The sdist needs neither torch nor a compiler. A wheel's metadata needs to know the torch, and compiles nothing.
plan = build_backend.make_plan() if compiles or "dist_info" in commands else build_backend.Plan()
setup(
    version=build_backend.version(plan),
    install_requires=[build_backend.torch_requirement(plan)],
    **build_backend.package_page(),
    **(extension(plan) if compiles else {}),
)
