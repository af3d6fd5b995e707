#!/usr/bin/env python3
"""The packed notebook on other machines' stacks: old and new pandas, numpy and transformers, no network, input read-only.

    python tests/check_stacks.py PYTHON [PYTHON ...]       these interpreters, each with torch, transformers, pandas and papermill
    python tests/check_stacks.py --build FOLDER            environments with the oldest and the newest versions, made in FOLDER first

Three tiny runs and an ensemble are packed by this environment. Every stack runs the packed notebook twice, with ample time and with a few seconds, and must write
a valid file; with ample time every model is used and the file is the one that this environment writes.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from packing import competition_files, tiny_run  # noqa: E402

STACKS = {  # what a stack has beside COMMON
    "oldest": ("pandas==2.2.*", "numpy==2.0.*", "transformers==4.57.*"),
    "middle": ("pandas==2.3.*", "transformers==5.0.*"),
    "newest": ("pandas", "numpy", "transformers"),
}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
COMMON = ("safetensors", "scikit-learn", "tqdm", "papermill", "ipykernel", "pydantic", "filelock", "pyarrow", "psutil")
NEVER_THERE = ("ftfy", "emoji", "ahocorasick", "esci_nb")
NAMESPACE = ("unshare", "-rnm")
INSIDE = """
mount --bind {input} {input} && mount -o remount,ro,bind {input}
{python} -c 'import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))'
exec {python} -m papermill --log-level ERROR --no-progress-bar --cwd {home} {input}/package/submission.ipynb {output}/out.ipynb -k python3 \
  -p input_folder {input} -p output_folder {output} -p hours {hours}
"""


def build(folder: Path) -> list[Path]:
    "Virtual environments of `STACKS`, made by the Python that runs this; their interpreters."
    pythons = []
    for name, packages in STACKS.items():
        python = folder / name / "bin" / "python"
        if not (folder / name / "READY").exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
            torch = [python, "-m", "pip", "install", "-q", "torch==2.13.0"]  # the CPU build where its index can be reached
            if subprocess.run([*torch, "--no-deps", "--retries", "0", "--timeout", "20", "--index-url", CPU_WHEELS], capture_output=True).returncode:
                subprocess.run(torch, check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", *COMMON, *packages], check=True)
            (folder / name / "READY").touch()
        pythons.append(python)
    return pythons


def pack_runs(home: Path) -> Path:
    "A folder with test lists, a catalogue and a package of three tiny runs; returns it."
    from esci_nb.ship.package import pack
    titles = competition_files(home / "input" / "data")["product_title"]
    runs = [tiny_run(home / "runs" / name, titles, cv, locales, seed) for seed, (name, cv, locales) in enumerate(
        [("strong", 0.85, ("us", "es", "jp")), ("weak", 0.80, ("us", "es", "jp")), ("english", 0.83, ("us",))])]
    pack(runs, home / "input" / "package")
    return home / "input"


def run_notebook(python: Path, data: Path, output: Path, hours: float) -> str:
    "Run the packed notebook with this interpreter; what its cells said, or what went wrong."
    output.mkdir(parents=True)
    home = output / "home"
    home.mkdir()
    script = INSIDE.format(input=data, python=python, output=output, home=home, hours=hours)
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "OMP_NUM_THREADS")}
    done = subprocess.run([*NAMESPACE, "sh", "-c", script], env=clean | {"HOME": str(home)}, capture_output=True, text=True, timeout=900)
    if done.returncode:
        return f"exit {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    outputs = [one for cell in nbformat.read(output / "out.ipynb", 4).cells for one in cell.get("outputs", [])]
    return "\n".join(one.get("text", "") or one.get("data", {}).get("text/plain", "") for one in outputs)


def check(python: Path, data: Path, work: Path, expected: bytes) -> list[str]:
    "What is wrong with the packed notebook on one stack."
    from esci_nb.rank.submission import check_submission, read_candidates
    present = subprocess.run([python, "-c", f"import importlib.util as u; print(*[n for n in {NEVER_THERE} if u.find_spec(n)])"],
                             capture_output=True, text=True, cwd=work, env={**os.environ, "PYTHONPATH": ""}).stdout.split()
    wrong = [f"{', '.join(present)} is installed there, so nothing is shown"] if present else []
    candidates = read_candidates(next((data / "data").glob("test*")))
    for name, hours in (("ample", 1.0), ("short", 3 / 3600)):
        output = work / python.parent.parent.name / name
        said = run_notebook(python, data, output, hours)
        (output / "said.txt").write_text(said)
        try:
            check_submission(output / "submission.csv", candidates)
        except Exception as error:
            wrong.append(f"{name}: {error}")
        if name == "ample":
            print(said.splitlines()[0], flush=True)
            if said.count(" used ") != 3 or "failed" in said or "older than" in said:
                wrong.append(f"{name}: not every model was used:\n{said[-1500:]}")
            elif (output / "submission.csv").read_bytes() != expected:
                wrong.append(f"{name}: another ranking than here")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", type=Path)
    parser.add_argument("--build", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    pythons = [*map(Path.absolute, arguments.pythons), *(build(arguments.build.absolute()) if arguments.build else [])]
    if not pythons:
        parser.error("give interpreters, or --build FOLDER")
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        print("unshare -rnm is not permitted here, so nothing can be run without network", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="stacks-") as folder:
        data = pack_runs(Path(folder))
        print(json.dumps(sorted(path.name for path in (data / "package" / "wheels").iterdir()), indent=1))
        from esci_nb.rank.submission import read_candidates
        from esci_nb.ship.first import find_attached
        from esci_nb.ship.inference import rank_lists
        from esci_nb.ship.package import open_package
        lists, catalogues = find_attached(data)
        here = rank_lists(open_package(data / "package"), read_candidates(lists), catalogues, Path(folder) / "here.csv", 600, say=lambda line: None)
        for python in pythons:
            wrong = check(python, data, Path(folder), here.path.read_bytes())
            print(f"{python}: {'; '.join(wrong) if wrong else 'ample and short time, a valid file each, the same ranking as here'}", flush=True)
            failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
