"""Runs every CUDA kernel in every variant once, on small work: for compute-sanitizer, which makes a kernel a hundred
times slower, and for a profiler.

    python tests/every_kernel.py            # needs a GPU
    python tests/every_kernel.py --list     # what it would run
"""

import argparse
from collections.abc import Callable

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


def scale(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for grad in (torch.randn(70003, device="cuda").to(dtype), torch.randn(70004, device="cuda").to(dtype)[1:]):
        for tensor in (
            None,
            torch.tensor(0.5, device="cuda"),
            torch.tensor(0.5, device="cuda", dtype=torch.float64),
            torch.rand(grad.numel(), device="cuda").to(wide),
        ):
            torch.ops.grl_ext._scale(grad, -0.5, tensor)
            torch.ops.grl_ext._scale_(grad.clone(), -0.5, tensor)
            if tensor is None or tensor.dim() == 0:
                torch.ops.grl_ext._scale_list_([grad.clone(), grad[:3].clone()], -0.5, tensor)


def heads(dtype: torch.dtype, rows: int, features: int, sizes: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count = len(sizes)
    x = torch.randn(rows, features, device="cuda").to(dtype)
    weight = [torch.randn(size, features, device="cuda").to(dtype) / features for size in sizes]
    bias = [torch.zeros(size, device="cuda", dtype=dtype) if h % 2 == 0 else None for h, size in enumerate(sizes)]
    factor = [1.0 if h % 2 == 0 else -1.0 for h in range(count)]
    stored = {1: torch.tensor(0.5, device="cuda"), 3: torch.tensor(0.5, device="cuda", dtype=torch.float64)}
    lambda_ = [stored.get(h % 4) for h in range(count)]
    needs = [True] * (1 + 2 * count)
    logits = torch.ops.grl_ext._heads_logits(x, weight, bias)
    torch.ops.grl_ext._heads_gradients([z / rows for z in logits], x, weight, factor, lambda_, needs)
    for kind in ("classes", "probabilities", "values"):
        targets: list[Tensor] = []
        for size in sizes:
            if kind == "classes":
                targets.append(torch.randint(-1, max(2, size), (rows,), device="cuda"))
            else:
                values = torch.rand(rows, size, device="cuda", dtype=wide)
                targets.append(F.normalize(values, p=1, dim=1) if kind == "probabilities" and size > 1 else values)
        squared = kind == "values"
        sample_weight = [torch.rand(rows, device="cuda", dtype=wide) if h % 2 == 1 else None for h in range(count)]
        class_weight = [
            torch.rand(max(2, size), device="cuda", dtype=wide) if h % 3 == 1 and not squared else None
            for h, size in enumerate(sizes)
        ]
        torch.ops.grl_ext._heads_loss(
            x, weight, bias, targets, sample_weight, class_weight, factor, lambda_, torch.ones(count),
            [int(squared)] * count, [0.0 if squared else 0.1] * count, [-1] * count, kind != "probabilities",
            False, needs,
        )  # fmt: skip


def work() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for dtype in DTYPES:
        found[f"{dtype}: scale"] = lambda dtype=dtype: scale(dtype)
        for name, shape in SHAPES.items():
            found[f"{dtype}: heads, {name}"] = lambda dtype=dtype, shape=shape: heads(dtype, *shape)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="a part of the names")
    options = parser.parse_args()
    chosen = {name: run for name, run in work().items() if options.only in name}
    if not chosen:
        raise SystemExit(f"nothing is called {options.only}")
    if not options.list and _backend.C is None:
        raise SystemExit(f"no compiled extension: {_backend.why_not}")
    torch.manual_seed(0)
    for name, run in chosen.items():
        print(name, flush=True)
        if not options.list:
            run()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
