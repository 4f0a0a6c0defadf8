"""What tests compile: once for the same sources, options and compiler, in build/, where the next run finds it."""

import fcntl
import hashlib
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"


def built(file: Path, sources: Iterable[Path], command: Sequence[str | Path]) -> Path:
    """The path of what `command` compiles; it ends with the option that names the output, to which a path is added.
    `file` says where it is kept, under a name with a hash. Other processes wait meanwhile."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    contents = b"".join(path.read_bytes() for path in sorted(sources))
    digest = hashlib.sha256(contents + version + " ".join(map(str, command)).encode()).hexdigest()[:16]
    result = file.with_name(f"{file.stem}-{digest}{file.suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in file.parent.glob(f"{file.stem}-{'[0-9a-f]' * 16}{file.suffix}"):
                old.unlink()
            new = result.with_suffix(".new")
            compiled = subprocess.run([*command, new], capture_output=True, text=True)
            assert compiled.returncode == 0, compiled.stderr
            new.rename(result)
    return result
