"""One grid of two rounds on every place: `python tests/measure_places.py --to nbs/results/places.csv`, on a quiet machine.

Three runs of a first round teach nothing but labels, six more learn from them, and an ensemble is made: small runs, in which everything besides training shows.
Each place starts in a process of its own and with an empty folder. Written down: seconds until the first job begins, seconds of the whole grid, seconds
per job above the bare calls (the code cells of the same notebooks, run in one plain process one after the other) and that as a share of a run of 3 minutes,
and whether the results are bit-equal to those of the first place. Places whose package is missing are left out."""
import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from kill_grid import ENSEMBLE, GRID, ROOT, results

PLACES = {"here, 1 worker": "", "here, 2 workers": "", "ray, 2 runs at a time": "ray", "slurm's local executor": "submitit"}
RUN_SECONDS = 180


def place_of(name: str):
    "The place of a name."
    from esci_nb.run.clusters import RayCluster, Slurm
    from esci_nb.run.workers import OneMachine
    if name.startswith("here"):
        return OneMachine(int(name.split()[1]))
    return RayCluster(workers=2) if name.startswith("ray") else Slurm({"timeout_min": 60, "gpus_per_node": 0}, "local")


def run_place(name: str, file: Path, files: Path, outputs: Path) -> None:
    "In a process of its own: run the grid at a place."
    from esci_nb.run.grid import run_grid
    from esci_nb.run.plan import read_grid
    run_grid(read_grid(file), str(files), outputs, place_of(name))


def run_bare(file: Path, files: Path, outputs: Path) -> float:
    "In a process of its own: the code of every job's notebook, one after the other; their seconds, without that of loading libraries."
    import matplotlib
    from esci_nb.files import seal
    from esci_nb.run.grid import plan_grid
    from esci_nb.run.plan import read_grid
    from esci_nb.run.stages import PROJECT
    matplotlib.use("Agg")
    import esci_nb.train.fit  # noqa: F401
    plan, seconds = plan_grid(read_grid(file), str(files), outputs), 0.0
    os.environ["ESCI_NB_RUNNER"] = "1"
    for job in plan.jobs:
        cells = json.loads((PROJECT / "nbs" / "pipeline" / f"{job.stage}.ipynb").read_text())["cells"]
        start, names = time.perf_counter(), {"display": lambda *_: None}
        for cell in (cell for cell in cells if cell["cell_type"] == "code"):
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= job.parameters
        seconds += time.perf_counter() - start
        matplotlib.pyplot.close("all")
        seal(job.folder)
    return seconds


def watch(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    "Seconds until a command announced its first job, and until it ended."
    start, first = time.perf_counter(), float("nan")
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if re.match(r"1 of \d+: ", line):
            first = time.perf_counter() - start
    if process.wait():
        raise RuntimeError("".join(said[-20:]))
    return first, time.perf_counter() - start


def main() -> int:
    "All places, one after the other."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--to", type=Path, help="also write the table to this CSV")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, *paths = arguments.one
        print(f"\n{run_bare(*map(Path, paths))}" if name == "bare" else run_place(name, *map(Path, paths)))
        return 0
    from esci_nb.data.sample import write_sample
    from esci_nb.measure.results import write_result
    work, lines = Path(tempfile.mkdtemp(prefix="places-")), []
    file, files = work / "grid.toml", work / "files"
    file.write_text(GRID.format(folds=[0, 1, 2]).replace("n_folds = 2", "n_folds = 3").replace("epochs = 2", f"epochs = {arguments.epochs}") + ENSEMBLE)
    write_sample(files, scale=0.0006)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def words(name: str, outputs: Path) -> list[str]:
        return [sys.executable, __file__, "--one", name, str(file), str(files), str(outputs)]
    bare = subprocess.run(words("bare", work / "bare" / "outputs"), env=environment, check=True, capture_output=True, text=True).stdout
    bare_seconds = float(bare.strip().split("\n")[-1])
    expected = None
    for name, package in PLACES.items():
        if package and importlib.util.find_spec(package) is None:
            continue
        outputs = work / name.replace(" ", "-") / "outputs"
        first, whole = watch(words(name, outputs), environment)
        found, jobs = results(outputs), len(list(outputs.glob("*/*/DONE")))
        expected = expected or found
        above = (whole - first - bare_seconds) / jobs if name == "here, 1 worker" else float("nan")
        lines.append({"what": name, "jobs": jobs, "seconds until the first job": first, "seconds": whole, "bare seconds of all jobs": bare_seconds,
                      "seconds per job above bare": above, "share of a run of 3 minutes": above / RUN_SECONDS,
                      "goal": "share < 0.03" if name == "here, 1 worker" else "", "identical": found == expected})
        print(lines[-1], flush=True)
    table = pd.DataFrame(lines).assign(data="embedded sample, scale 0.0006")
    if arguments.to:
        write_result(table, arguments.to, ["small"], "python tests/measure_places.py")
    with contextlib.suppress(OSError):
        shutil.rmtree(work)
    return 0 if table["identical"].all() else 1


if __name__ == "__main__":
    sys.exit(main())
