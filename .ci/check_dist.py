"""Checks the wheel and the sdist in dist/, and that each, installed into an environment of its own, computes a right
gradient.

The wheel is first given its manylinux tag by auditwheel. torch's own libraries stay outside: the installed torch has
them.
"""

import os
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TORCH_LIBRARIES = ("libc10*", "libtorch*", "libcudart*")

USE = """
import torch, grl_ext
from grl_ext import _backend
assert _backend.C is not None, _backend.why_not
x = torch.randn(5, 7, requires_grad=True)
grl_ext.GRL(0.3)(x).sum().backward()
assert torch.equal(x.grad, torch.full((5, 7), -0.3)), x.grad
layer = grl_ext.GRLLinear(7, 2, lambda_=0.5)
(dx,) = torch.autograd.grad(layer(x).sum(), x)
torch.testing.assert_close(dx, -0.5 * layer.weight.sum(0).expand(5, 7))
"""


def run(*command, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def tool(name: str) -> Path:
    return Path(sysconfig.get_path("scripts")) / name


def check_traces(name: str, content: bytes) -> None:
    """Nothing in what is published says where it was made."""
    machine = [socket.gethostname()] if len(socket.gethostname()) > 7 else []  # a shorter name is found by chance
    for trace in (str(ROOT), f"{Path.home()}/", sys.prefix, *machine):
        assert trace.encode() not in content, f"{name} contains '{trace}'"


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    for name, content in contents.items():
        check_traces(f"{wheel.name}: {name}", content)
    files = {name for name in contents if ".dist-info/" not in name}
    expected = {f"grl_ext/{path.name}" for path in (ROOT / "grl_ext").glob("*.py")} | {"grl_ext/py.typed"}
    extension = files - expected
    assert expected <= files, f"{wheel.name} lacks {sorted(expected - files)}"
    assert len(extension) == 1 and min(extension).startswith("grl_ext/_C_torch"), (
        f"{wheel.name} also holds {sorted(extension)}"
    )


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            check_traces(f"{sdist.name}: {member.name}", archive.extractfile(member).read())


def check_use(package: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        site = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        # torch is large: the new environment sees the one that this script runs with.
        Path(site, "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(
            python, "-m", "pip", "install", "--quiet", "setuptools>=77", "wheel", "ninja"
        )  # what an isolated build would install
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "--no-cache-dir",
            package,
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run(python, "-c", USE, cwd=folder, env=environment)
        run(python, "-m", "grl_ext", cwd=folder, env=environment)


def main() -> None:
    (built,) = DIST.glob("*.whl")
    excluded = [f"--exclude={library}" for library in TORCH_LIBRARIES]
    run(
        tool("auditwheel"),
        "repair",
        *excluded,
        "--wheel-dir",
        DIST,
        built,
        env={**os.environ, "PATH": f"{tool('')}:{os.environ['PATH']}"},
    )
    built.unlink()
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(tool("twine"), "check", "--strict", wheel, sdist)
    check_wheel(wheel)
    check_sdist(sdist)
    for package in (wheel, sdist):
        check_use(package)
        print(f"{package.name}: {package.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
