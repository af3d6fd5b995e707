"""Kills a grid of two rounds again and again and checks what is left: `python tests/kill_grid.py --kills 100`, or with `--on ray`.

The command, one of its workers, one kernel or the whole tree is killed with SIGKILL at a random moment; where the command was killed, the same
command is started again at once. Checked: no process of a killed command is left 10 s later; a start never ends because one process died; what was
done is not touched again; the results are bit-equal to those of a grid that nobody disturbed. It goes on after a failure, prints one line per kill
and a verdict, and exits with 1 if anything failed."""
import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "ESCI_NB_KILLED_GRID"  # in the environment of every process of a start: which one it is
CLUSTER = "cluster"  # the same of a Ray cluster
WHAT = ("command", "worker", "kernel", "tree")
GRID = """recipes = ["pseudo"]
folds = {folds}
[data]
n_folds = 2
[recipe]
epochs = 2
precision = "fp32"
max_length = 32
text_fields = ["title"]
[[backbone]]
name = "small"
"""
ENSEMBLE = '[[ensemble]]\nname = "all"\n'


def processes(mark: str) -> list[psutil.Process]:
    "The living processes of a start."
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get(MARK) == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            pass
    return found


def is_alive(one: psutil.Process) -> bool:
    "Whether a process still runs."
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_kernel(one: psutil.Process) -> bool:
    "Whether a process is the kernel of a notebook, out of a warm process or started anew."
    try:
        return one.name() == "esci_nb-kernel" or "ipykernel_launcher" in one.cmdline()
    except psutil.Error:
        return False


def role(one: psutil.Process) -> str:
    "What a process of a start is: command, worker, kernel (or the warm process that kernels come from) or other."
    try:
        words = " ".join(one.cmdline())
    except psutil.Error:
        return "gone"
    known = (("kernel", "run.kernels import wait_for_work"), ("worker", "run.workers import work"), ("worker", "ray::do_packed"), ("command", "kill_grid_command"))
    return next((name for name, word in known if word in words), "other")


def results(outputs: Path) -> dict[str, str]:
    "Digest of every result of the finished folders: tables by content, weights and submissions by bytes."
    found = {}
    for done in sorted(outputs.glob("*/*/DONE")):
        for path in sorted(done.parent.rglob("*")):
            if path.suffix == ".parquet" and "tokens" not in path.parts:
                found[str(path.relative_to(outputs))] = hashlib.sha256(pd.read_parquet(path).to_csv().encode()).hexdigest()
            elif path.name == "history.csv":
                found[str(path.relative_to(outputs))] = pd.read_csv(path).drop(columns="pairs_per_second").to_csv()
            elif path.suffix in (".safetensors", ".csv"):
                found[str(path.relative_to(outputs))] = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(done.relative_to(outputs))] = "done"
    return found


def finished(outputs: Path) -> dict[str, int]:
    "When each result in a finished folder was written."
    return {str(path): path.stat().st_mtime_ns for done in outputs.glob("*/*/DONE") for path in (done, *done.parent.glob("*.parquet"))}


class Grid:
    "One grid in a folder of its own, and the starts of its command."

    def __init__(self, work: Path, name: str, files: Path, folds: list[int], workers: int, cluster: str = ""):
        self.cluster = cluster
        self.outputs, self.name, self.workers, self.starts, self.problems, self.command = work / name / "outputs", name, workers, 0, [], None
        self.outputs.parent.mkdir(parents=True, exist_ok=name == "reference")
        self.file, self.files, self.log = work / name / "grid.toml", files, work / name / "command.log"
        self.file.write_text(GRID.format(folds=folds) + (ENSEMBLE if len(folds) > 1 else ""))

    @property
    def mark(self) -> str:
        return f"{self.outputs}-{self.starts}"

    def start(self) -> None:
        "Start the command; what is finished now must stay as it is."
        self.starts, self.deaths, self.before = self.starts + 1, 0, finished(self.outputs)
        words = ["grid", str(self.file), str(self.files), "--outputs", str(self.outputs), "--workers", str(self.workers)]
        words += ["--on", "ray", "--address", self.cluster] if self.cluster else []
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        with open(self.log, "ab") as log:
            self.command = subprocess.Popen([sys.executable, "-c", f"import sys; kill_grid_command = 1; from esci_nb.cli import main; sys.exit(main({words!r}))"],
                                            env=environment, stdout=log, stderr=log, cwd=self.outputs.parent)

    def family(self) -> list[psutil.Process]:
        "The processes of the running start: those that it started, and on Ray the workers and kernels of the cluster, which serves nobody else."
        return processes(self.mark) + [one for one in processes(CLUSTER) if self.cluster and role(one) in ("worker", "kernel")]

    def check_untouched(self) -> None:
        "What was finished when the command started is as it was."
        now = finished(self.outputs)
        self.problems += [f"{path} was written again" for path, when in self.before.items() if now.get(path) != when]

    def kill(self, what: str, rng: random.Random) -> str:
        "Kill something of the running command; returns what it was. A killed command is started again at once."
        family = self.family()
        chosen = [one for one in family if role(one) == what]
        if what in ("worker", "kernel") and chosen and self.deaths < 2:  # the third death of one job may end it, by design
            self.deaths += 1
            rng.choice(chosen).kill()
            return what
        what = "tree" if what == "tree" else "command"
        for one in family if what == "tree" else [one for one in family if role(one) == "command"]:
            with_suppressed(one.kill)
        self.command.wait()
        self.check_untouched()
        self.start()
        deadline = time.monotonic() + 10
        while (left := list(filter(is_alive, family))) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.problems += [f"{role(one)} {one.pid} was left 10 s after its command" for one in left]
        for one in left:
            with_suppressed(one.kill)
        return what

    def ended(self) -> bool:
        "Whether the command is over; a start that ends badly is a problem, since it was not killed itself."
        code = self.command.poll()
        if code is None:
            return False
        self.check_untouched()
        if code:
            last = self.log.read_text(errors="replace").strip().split("\n")[-3:]
            self.problems.append(f"start {self.starts} ended with {code} after {self.deaths} deaths: {' | '.join(last)}")
        return True


def with_suppressed(call) -> None:
    "Call, unless the process is gone."
    try:
        call()
    except psutil.Error:
        pass


def undisturbed(work: Path, files: Path, folds: list[int], workers: int) -> tuple[dict[str, str], float]:
    "The results of a grid that nobody disturbs, and the seconds that it took."
    grid, start = Grid(work, "reference", files, folds, workers), time.monotonic()
    grid.start()
    grid.command.wait()
    assert grid.ended() and not grid.problems, grid.problems
    return results(grid.outputs), time.monotonic() - start


def kill_one_grid(work: Path, name: str, files: Path, folds: list[int], workers: int, expected: dict[str, str], seconds: float, kills: list[str],
                  rng: random.Random, cluster: str = "") -> tuple[int, list[str]]:
    "Kill a grid as `kills` says, each within `seconds` of the one before, and let it finish; how many kills there were, and what was wrong."
    grid, counted = Grid(work, name, files, folds, workers, cluster), 0
    grid.start()
    try:
        for what in kills:
            deadline = time.monotonic() + rng.uniform(0.5, seconds)
            while time.monotonic() < deadline and not grid.ended():
                time.sleep(0.05)
            if grid.ended():
                break
            known = len(grid.problems)
            killed = grid.kill(what, rng)
            counted += 1
            print(f"{name} kill {counted}: {killed}, start {grid.starts}, {len(list(grid.outputs.glob('*/*/DONE')))} folders done"
                  + "".join(f"\n  PROBLEM {text}" for text in grid.problems[known:]), flush=True)
        while not grid.ended():
            time.sleep(0.2)
        found = results(grid.outputs)
        grid.problems += [f"{path} differs" for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
        grid.problems += [f"{path} was left" for path in grid.outputs.rglob(".*.part") if path.parent.name != "tokens"]
        return counted, grid.problems
    finally:
        for one in grid.family():
            with_suppressed(one.kill)


def start_cluster(work: Path, workers: int, port: int = 6399) -> str:
    "A Ray cluster of this machine that outlives the commands; its address."
    environment = os.environ | {MARK: CLUSTER, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled",
                                "RAY_raylet_start_wait_time_s": "180"}
    ports = ["--dashboard-agent-grpc-port=6391", "--dashboard-agent-listen-port=6392", "--runtime-env-agent-port=6393", "--metrics-export-port=6394"]
    words = ["start", "--head", f"--port={port}", *ports, "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--num-cpus={workers}", "--object-store-memory=100000000"]
    subprocess.run([Path(sys.executable).parent / "ray", *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return f"127.0.0.1:{port}"


def main() -> int:
    "Kill until there were enough; the verdict as an exit code."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-grid", type=int, default=12, help="kills of one grid, which then finishes and is compared (12)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, help="most seconds between two kills (a third of what the undisturbed grid took)")
    parser.add_argument("--on", choices=["here", "ray"], default="here", help="where the killed grids run: here, or on a Ray cluster that outlives its commands (here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder, with a reference from before or none; else a temporary one, removed unless something failed")
    arguments = parser.parse_args()
    from esci_nb.data.sample import write_sample
    work, rng = Path(arguments.work or tempfile.mkdtemp(prefix="kill_grid-")), random.Random(arguments.seed)
    files, done, problems, number = work / "files", {}, [], 0
    write_sample(files, scale=0.0006)
    expected, seconds = undisturbed(work, files, [0, 1], arguments.workers)
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} results", flush=True)
    cluster = start_cluster(work, arguments.workers) if arguments.on == "ray" else ""
    while sum(done.values()) < arguments.kills and number < arguments.kills:
        number += 1
        kills = [rng.choice(WHAT) for _ in range(min(arguments.per_grid, arguments.kills - sum(done.values())))]
        name = f"grid{number}"
        try:
            done[name], wrong = kill_one_grid(work, name, files, [0, 1], arguments.workers, expected, arguments.every or seconds / 3, kills, rng, cluster)
        except Exception as error:  # the verdict is about all of them
            done[name], wrong = 0, [f"{type(error).__name__}: {error}"]
        print(f"{name}: {done[name]} kills, " + ("bit-equal, nothing done twice" if not wrong else f"{len(wrong)} PROBLEMS"), *wrong, sep="\n  ", flush=True)
        problems += wrong
        if not wrong:
            shutil.rmtree(work / name)
    for one in processes(CLUSTER):
        with_suppressed(one.kill)
    print(f"VERDICT: {sum(done.values())} kills of {len(done)} grids, {len(problems)} problems: {'FAILED, see ' + str(work) if problems else 'passed'}")
    if not problems and not arguments.work:
        shutil.rmtree(work)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
