"""Finds the compiled extension, or says why it is not used, and reports what runs where."""

import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

# The newest torch that the tests ran with (`make versions`). A newer one is not refused, but the report says so.
NEWEST_TESTED_TORCH = (2, 14)


def release(version: str) -> tuple[int, int]:
    """Major and minor number: what a compiled extension depends on."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module or None, and in the second case the reason.

    Its name says which torch it was built for, because one that was built for another may not be loaded to be asked.
    """
    name = "_C_torch{}_{}".format(*release(torch.__version__))
    present = sorted(
        module.name
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if module.name.startswith("_C_torch")
    )
    if not present:
        return (
            None,
            "this installation has no compiled extension (GRL_EXT_BUILD=python, or a source tree that was not built)",
        )
    if name in present:
        try:
            return importlib.import_module(f"grl_ext.{name}"), ""
        except ImportError as error:
            reason = f"the compiled extension does not load with torch {torch.__version__}: {error}"
    else:
        built = " and ".join(other.removeprefix("_C_torch").replace("_", ".") for other in present)
        reason = f"the compiled extension was built for torch {built}, this is torch {torch.__version__}"
    warnings.warn(
        f"grl_ext runs without its kernels: {reason}. Rebuild it for this torch: "
        "pip install --force-reinstall --no-deps --no-cache-dir .",
        RuntimeWarning,
        stacklevel=4,
    )
    return None, reason


C, why_not = _load()

# The devices for which kernels are compiled.
kernel_devices = () if C is None else ("cpu", "cuda") if C.build_info()["cuda_archs"] else ("cpu",)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels are compiled for this device: for a GPU, for its compute capability."""
    if device.type not in kernel_devices:
        return False
    return device.type != "cuda" or C.serves_gpu(torch.cuda.current_device() if device.index is None else device.index)


# As torch.compiler.assume_constant_result does, without its import of all of Dynamo: what a graph is traced for stays
# what it runs on.
has_kernels._dynamo_marked_constant = True
