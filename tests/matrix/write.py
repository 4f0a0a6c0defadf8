"""Runs the matrix and writes what it gives to `outcomes.json` and `docs/works-with.md`: `python tests/matrix/write.py`.

GRL_EXT_MATRIX=all also runs the rows that need other packages (`make matrix`); without it their outcomes stay as they
are.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from matrix import table
    from matrix.rows import ROWS
    from matrix.run import outcomes, path_here, start_pure_python

    assert path_here() == "compiled", "nothing is compiled: make build"
    with tempfile.TemporaryDirectory() as folder:
        process, file = start_pure_python(Path(folder))
        found = {"compiled": outcomes()}
        assert process.wait() == 0
        found["fallback"] = json.loads(file.read_text())
    _, written = table.read()
    result: table.Outcomes = {name: {} for name in ROWS}
    failed = []
    for name, row in ROWS.items():
        for column in row.columns:
            cell = {path: found[path][name][column] for path in found if column in found[path].get(name, {})}
            result[name][column] = written.get(name, {}).get(column, {}) | cell
            failed += [
                f"{name} | {column} | {path}: {outcome}"
                for path, outcome in cell.items()
                if outcome.startswith("FAILED")
            ]
    if failed:
        sys.exit("\n".join(failed))
    version = torch.__version__.partition("+")[0]
    table.OUTCOMES.write_text(json.dumps({"torch": version, "outcomes": result}, indent=1, ensure_ascii=False) + "\n")
    table.PAGE.write_text(table.page(result, version))
    subprocess.run(["git", "diff", "--stat"], cwd=table.ROOT, check=False)
