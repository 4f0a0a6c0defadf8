"""`python -m grl_ext`: versions, what is compiled, and which path each operation takes on each device here."""

import os
import platform

import torch

from grl_ext import __version__, _backend


def _compiler(version: str) -> str:
    """GCC's __VERSION__ is a bare number, others' begin with their names."""
    return f"GCC {version}" if version[:1].isdigit() else version


def _gpus() -> list[str]:
    """A GPU of each compute capability here: "cuda" where all are the same."""
    first = {torch.cuda.get_device_capability(i): f"cuda:{i}" for i in reversed(range(torch.cuda.device_count()))}
    return ["cuda"] if len(first) == 1 else sorted(first.values())


def _why_not(device: str, name: str, info: dict | None) -> str:
    if info is None:
        return "nothing compiled"
    if device not in _backend.kernel_devices:
        return "nothing compiled for it"
    major, minor = torch.cuda.get_device_capability(name)
    return f"nothing compiled for its compute capability, {major}.{minor}"


def main() -> None:
    info = _backend.C.build_info() if _backend.C else None
    untested = ""
    if _backend.release(torch.__version__) > _backend.NEWEST_TESTED_TORCH:
        untested = f" (not tested; the newest tested torch is {'.'.join(map(str, _backend.NEWEST_TESTED_TORCH))})"
    python = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"grl_ext {__version__} on torch {torch.__version__}{untested}, {python}")
    if info is None:
        print(f"compiled:      no ({_backend.why_not})")
    else:
        print(f"compiled:      for torch {info['torch']}, by {_compiler(info['compiler'])}")
        asked = os.environ.get("GRL_EXT_CPU_ISA")
        isa = f"GRL_EXT_CPU_ISA={asked}" if asked else "the widest here; GRL_EXT_CPU_ISA can ask for another"
        threads = torch.get_num_threads()
        print(f"CPU kernels:   {info['cpu_isa']} ({isa}), {threads} thread{'s' if threads > 1 else ''}")
        unused = " (PyTorch sees no GPU here)" if info["cuda_archs"] and not torch.cuda.device_count() else ""
        print(f"CUDA kernels:  {info['cuda_archs'] or 'no'}{unused}")

    devices = ["cpu", *_gpus()] + (["mps"] if torch.backends.mps.is_available() else [])
    for name in devices:
        device = torch.device(name).type
        compiled = _backend.has_kernels(torch.device(name))
        why = "" if compiled else f" ({_why_not(device, name, info)})"
        scale = "fused scale backward" + (", in place where unshared" if device == "cpu" else "")
        layer = f"view forward; {scale}" if compiled else "PyTorch operators" + why
        heads = "PyTorch operators" + why
        if compiled:
            heads = f"fused kernels up to {info[f'max_columns_{device}']} columns, matrix products beyond"
        print(f"{name}:")
        print(f"  gradient_reversal                      {layer}")
        print(f"  grl_linear, linear_heads, heads_loss   {heads}")
    print("under torch.compile and torch.export: registered operators; under torch.func: PyTorch operators")


if __name__ == "__main__":
    main()
