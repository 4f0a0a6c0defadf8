"""Finds the compiled extension, or says why it is not used, and reports what runs where."""

import importlib.util
import re
import warnings
from types import ModuleType

import torch

# The newest torch that the tests ran with (`make versions`). A newer one is not refused, but the report says so.
NEWEST_TESTED_TORCH = (2, 14)


def release(version: str) -> tuple[int, int]:
    """Major and minor number: what a compiled extension depends on."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module or None, and in the second case the reason."""
    if importlib.util.find_spec("grl_ext._C") is None:
        return None, "this installation has no compiled extension (GRL_EXT_BUILD=python, or a source tree that was not built)"
    try:
        from grl_ext import _C
    except ImportError as error:
        reason = f"the compiled extension does not load with torch {torch.__version__}: {error}"
    else:
        built = _C.build_info()["torch"]
        if release(built) == release(torch.__version__):
            return _C, ""
        reason = f"the compiled extension was built for torch {built}, this is torch {torch.__version__}"
    warnings.warn(
        f"grl_ext runs without its kernels: {reason}. Rebuild it for this torch: pip install --force-reinstall --no-deps --no-cache-dir .",
        RuntimeWarning,
        stacklevel=4,
    )
    return None, reason


C, why_not = _load()

# The devices for which kernels are compiled.
kernel_devices = () if C is None else ("cpu", "cuda") if C.build_info()["cuda_archs"] else ("cpu",)
