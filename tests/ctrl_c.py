"""Presses Ctrl-C at random moments of a grid and of a demo: `python tests/ctrl_c.py --times 30`.

Each third time it is pressed twice. Checked: the command ends within 5 s with exit code 130 and one sentence, and no process of it is left."""
import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_grid import GRID, MARK, ROOT, processes


def press(words: list[str], folder: Path, wait: float, twice: bool) -> tuple[float, str]:
    "Start a command, press Ctrl-C after `wait` seconds; the seconds until it ended, and what was wrong."
    environment = os.environ | {MARK: str(folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = f"import sys; from esci_nb.cli import main; sys.exit(main({words!r}))"
    command = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=folder, start_new_session=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    time.sleep(wait)
    if command.poll() is not None:
        return 0.0, f"it was over after {wait:.1f} s"
    start = time.monotonic()
    for _ in range(1 + twice):  # a terminal tells every process of the group
        os.killpg(command.pid, signal.SIGINT)
        time.sleep(0.3 * twice)
    try:
        said = command.communicate(timeout=30)[1].strip().split("\n")
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGKILL)
        return 30.0, "it did not end"
    seconds, wrong = time.monotonic() - start, []
    if command.returncode != 130:
        wrong.append(f"exit code {command.returncode}")
    if "Traceback" in "\n".join(said) or "interrupted" not in said[-1]:
        wrong.append("it said: " + " | ".join(said[-3:]))
    if seconds > 5:
        wrong.append("it took longer than 5 s")
    if left := processes(str(folder)):
        wrong.append(f"{len(left)} processes were left")
    return seconds, "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--within", type=float, default=30, help="the last moment, in seconds after the start (30)")
    arguments = parser.parse_args()
    from esci_nb.data.sample import write_sample
    rng, took, failed = random.Random(0), [], 0
    with tempfile.TemporaryDirectory(prefix="ctrl_c-") as work:
        write_sample(Path(work) / "files", scale=0.002)
        (Path(work) / "grid.toml").write_text(GRID.format(folds=[0, 1]))
        for number in range(arguments.times):
            folder = Path(work) / str(number)
            folder.mkdir()
            command = ["grid", "../grid.toml", "../files", "--workers", "2"] if number % 2 else ["demo", "--data", "../files"]
            wait, twice = 2 + rng.random() * (arguments.within - 2), number % 3 == 2
            seconds, wrong = press(command, folder, wait, twice)
            took.append(seconds)
            failed += bool(wrong)
            print(f"{command[0]} after {wait:.1f} s, pressed {'twice' if twice else 'once'}: ended in {seconds:.2f} s{'; ' + wrong if wrong else ''}", flush=True)
    print(f"VERDICT: {arguments.times} times, median {statistics.median(took):.2f} s, at most {max(took):.2f} s, {failed} problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
