"""Runs every CUDA kernel in every variant once, on small work: to be compared with double precision on the CPU, for
compute-sanitizer, which makes a kernel a hundred times slower, and for a profiler.

    python tests/every_kernel.py            # needs a GPU
    python tests/every_kernel.py --check    # and compares the results
    python tests/every_kernel.py --large    # four launches of a size that shows the memory's speed
    python tests/every_kernel.py --list     # what it would run
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grl_ext import _backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# name: rows, features, sizes of the heads
SHAPES = {
    "one pass, two blocks a multiprocessor": (70, 256, (10, 2, 1)),
    "one pass, 512 threads": (70, 500, (30, 2)),
    "features at odd addresses": (37, 131, (3, 1)),
    "rows counted by a kernel": (9000, 64, (2, 2)),
    "two passes, halves by products": (40, 40000, (12, 2)),
    "products": (70, 256, (40, 3, 1)),
    "many heads": (70, 64, (1,) * 40),
}

# Of the largest number of a result. A half has 11 bits, or 8; a sum in f32 or f64 whose terms cancel loses some ten of
# its own.
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-12}


class Operators:
    """torch.ops.grl_ext on a device. With `check`, each result is compared with the same operator's in double precision
    on the CPU."""

    def __init__(self, device: str, check: bool) -> None:
        self.device, self.check = device, check

    def __call__(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        operator = getattr(torch.ops.grl_ext, name)
        same = in_double(arguments) if self.check else ()
        got = operator(*arguments)
        if self.check:
            wanted = operator(*same)
            if name.endswith("_"):  # in place
                got, wanted = arguments[0], same[0]
            compare(name, got, wanted, TOLERANCES[dtype])


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    return type(value)(map(in_double, value)) if isinstance(value, (list, tuple)) else value


def compare(name: str, got: Any, wanted: Any, tolerance: float) -> None:
    if isinstance(wanted, (list, tuple)):
        for a, b in zip(got, wanted, strict=True):
            compare(name, a, b, tolerance)
    elif isinstance(wanted, Tensor) and wanted.numel() > 0:
        error = (got.cpu().double() - wanted).abs().max().item()
        allowed = tolerance * max(1e-3, wanted.abs().max().item())
        if not error <= allowed:
            raise SystemExit(
                f"{name}: a result of shape {list(wanted.shape)} is off by {error:.3g}, over {allowed:.3g}"
            )


def scale(run: Operators, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = run.device
    for grad in (torch.randn(70003, device=device).to(dtype), torch.randn(70004, device=device).to(dtype)[1:]):
        for tensor in (
            None,
            torch.tensor(0.5, device=device),
            torch.tensor(0.5, device=device, dtype=torch.float64),
            torch.rand(grad.numel(), device=device).to(wide),
        ):
            run("_scale", dtype, grad, -0.5, tensor)
            run("_scale_", dtype, grad.clone(), -0.5, tensor)
            if tensor is None or tensor.dim() == 0:
                run("_scale_list_", dtype, [grad.clone(), grad[:3].clone()], -0.5, tensor)


def heads(run: Operators, dtype: torch.dtype, rows: int, features: int, sizes: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count, device = len(sizes), run.device
    x = torch.randn(rows, features, device=device).to(dtype)
    weight = [torch.randn(size, features, device=device).to(dtype) / features for size in sizes]
    bias = [torch.zeros(size, device=device, dtype=dtype) if h % 2 == 0 else None for h, size in enumerate(sizes)]
    factor = [1.0 if h % 2 == 0 else -1.0 for h in range(count)]
    stored = {1: torch.tensor(0.5, device=device), 3: torch.tensor(0.5, device=device, dtype=torch.float64)}
    lambda_ = [stored.get(h % 4) for h in range(count)]
    needs = [True] * (1 + 2 * count)
    logits = torch.ops.grl_ext._heads_logits(x, weight, bias)
    run("_heads_logits", dtype, x, weight, bias)
    run("_heads_gradients", dtype, [z / rows for z in logits], x, weight, factor, lambda_, needs)
    for kind in ("classes", "probabilities", "values"):
        targets: list[Tensor] = []
        for size in sizes:
            if kind == "classes":
                targets.append(torch.randint(-1, max(2, size), (rows,), device=device))
            else:
                values = torch.rand(rows, size, device=device, dtype=wide)
                targets.append(F.normalize(values, p=1, dim=1) if kind == "probabilities" and size > 1 else values)
        squared = kind == "values"
        sample_weight = [torch.rand(rows, device=device, dtype=wide) if h % 2 == 1 else None for h in range(count)]
        class_weight = [
            torch.rand(max(2, size), device=device, dtype=wide) if h % 3 == 1 and not squared else None
            for h, size in enumerate(sizes)
        ]
        run(
            "_heads_loss", dtype, x, weight, bias, targets, sample_weight, class_weight, factor, lambda_,
            torch.ones(count), [int(squared)] * count, [0.0 if squared else 0.1] * count, [-1] * count,
            kind != "probabilities", False, needs,
        )  # fmt: skip


def work(run: Operators) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found[f"{name}: scale"] = lambda dtype=dtype: scale(run, dtype)
        for shape_name, shape in SHAPES.items():
            found[f"{name}: heads, {shape_name}"] = lambda dtype=dtype, shape=shape: heads(run, dtype, *shape)
    return found


def large_loss(run: Operators, dtype: torch.dtype, features: int, sizes: tuple[int, ...]) -> None:
    """Features of 256 MB; on a CPU, which has no need of them, few rows."""
    rows, device, count = 65536 if run.device == "cuda" else 64, run.device, len(sizes)
    x = torch.randn(rows, features, device=device, dtype=dtype)
    weight = [torch.randn(size, features, device=device, dtype=dtype) / features for size in sizes]
    targets = [torch.randint(0, size, (rows,), device=device) for size in sizes]
    nothing: list[Tensor | None] = [None] * count
    run(
        "_heads_loss", dtype, x, weight, nothing, targets, nothing, nothing, [1.0, -1.0], nothing, torch.ones(count),
        [0] * count, [0.0] * count, [-100] * count, True, False, [True] * (1 + 2 * count),
    )  # fmt: skip


def large_work(run: Operators) -> dict[str, Callable[[], None]]:
    numbers = 1 << 26 if run.device == "cuda" else 1 << 10
    return {
        "scale": lambda: run("_scale", torch.float32, torch.randn(numbers, device=run.device), -0.5, None),
        "heads in float32, 10 and 2 classes": lambda: large_loss(run, torch.float32, 1024, (10, 2)),
        "heads in bfloat16, 10 and 2 classes": lambda: large_loss(run, torch.bfloat16, 2048, (10, 2)),
        "heads in bfloat16, 30 and 2 classes": lambda: large_loss(run, torch.bfloat16, 2048, (30, 2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true", help="compare with double precision on the CPU")
    parser.add_argument("--large", action="store_true", help="few launches, of large work")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="what names begin with")
    options = parser.parse_args()
    run = Operators(options.device, options.check)
    every = large_work(run) if options.large else work(run)
    chosen = {name: step for name, step in every.items() if name.startswith(options.only)}
    if not chosen:
        raise SystemExit(f"no name begins with {options.only}")
    if not options.list and _backend.C is None:
        raise SystemExit(f"no compiled extension: {_backend.why_not}")
    torch.manual_seed(0)
    for name, step in chosen.items():
        print(name, flush=True)
        if not options.list:
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()


if __name__ == "__main__":
    main()
