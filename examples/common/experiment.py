"""What every example needs around its experiment: the command line, the seeds' spread, and the files it leaves."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # plots go to files; there may be no screen
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import grl_ext  # noqa: E402

COLOURS = {
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "grey": "#777777",
    "pink": "#cc79a7",
}  # told apart by the colour-blind

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def parser(name: str, description: str, seeds: int) -> argparse.ArgumentParser:
    """The options all examples share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--seed", type=int, default=0, help="the first seed")
    options.add_argument("--seeds", type=int, default=seeds, help="how many seeds, from the first on")
    options.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    options.add_argument("--out", type=Path, default=Path("out") / name, help="folder for metrics.json and plot.png")
    options.set_defaults(started=time.time(), name=name)
    return options


def spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean, standard deviation and the values themselves, one for each seed."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": list(values),
    }


def shown(found: dict, digits: int = 3) -> str:
    """A spread as text: 0.912 ± 0.013. One value alone has no spread."""
    of_seeds = f" ± {found['sd']:.{digits}f}" if len(found["values"]) > 1 else " (one seed)"
    return f"{found['mean']:.{digits}f}{of_seeds}"


def curve(
    axes: Axes,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    label: str,
    colour: str,
    style: str = "-",
    circles: bool = False,
) -> None:
    """The mean over the seeds (rows of `runs`) as a line, one standard deviation to each side as a band.

    Lines that lie on each other are all seen: dashes and dots above the lines drawn through, and through the `circles`
    of another.
    """
    values = torch.tensor(runs)
    mean, sd = values.mean(0), values.std(0, correction=min(1, len(runs) - 1))
    look = {"color": COLOURS[colour], "linewidth": 1.8}
    if circles:
        every = max(1, len(x) // 10)
        look |= {"marker": "o", "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.5}
        for part, zorder in (({}, 2.1), ({"markerfacecolor": "none"}, 2.3)):  # the rings once more, above the dashes
            axes.plot(x[::every], mean[::every], **(look | part), linestyle="none", zorder=zorder)
    # `markevery=[]`: of its circles this line needs only the one in the legend.
    axes.plot(x, mean, style, **look, label=label, markevery=[], zorder=2 if style == "-" else 2.2)
    axes.fill_between(x, mean - sd, mean + sd, color=COLOURS[colour], alpha=0.15, linewidth=0)


def finish(args: argparse.Namespace, results: dict, figure: Figure, finding: str) -> dict:
    """Writes metrics.json and plot.png and prints the finding. Returns the metrics."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "started", "name")}
    metrics = {
        "finding": finding,
        "results": results,
        "command": f"python examples/{args.name}.py",
        "settings": {name: _without_folders(value) for name, value in settings.items()},
        "seconds": round(time.time() - args.started, 1),
        "versions": {
            "python": platform.python_version(),
            "grl_ext": grl_ext.__version__,
            **{package: _version(package) for package in ("torch", "numpy", "scikit-learn")},
        },
        "machine": {"system": sys.platform, "processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    save(figure, args.out)
    print(f"wrote {args.out / 'metrics.json'} and {args.out / 'plot.png'}")
    print(finding)
    return metrics


def save(figure: Figure, folder: Path) -> None:
    figure.savefig(folder / "plot.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def _without_folders(setting: object) -> object:
    """Of a path the last part: the rest says where it was on this machine, which is nobody else's matter."""
    is_path = isinstance(setting, Path) or (isinstance(setting, str) and Path(setting).is_absolute())
    return Path(setting).name if is_path else setting


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
