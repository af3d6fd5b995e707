"""The notebook to submit where it will live: no network, read-only input, another folder, only the packed wheel and its requirements.

The virtual environment sees this environment's packages through one path file, which leaves out editable installs: requirements are those
of this environment, `esci_nb` can come from nowhere but the wheel.
"""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from esci_nb.cli import main
from esci_nb.rank.submission import check_submission, read_candidates
from packing import competition_files, tiny_run

NAMESPACE = ["unshare", "-rnm"]
# in the namespace: the input is mounted read-only, the loopback device goes up (the kernel talks to papermill over it)
INSIDE = """
set -e
cd {elsewhere}
mount --bind {input} {input}
mount -o remount,ro,bind {input}
{python} - <<'END'
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))
try:
    socket.create_connection(("192.0.2.1", 80), 3)
except OSError as error:
    print("NO NETWORK:", error)
try:
    open("{input}/x", "w")
except OSError as error:
    print("READ ONLY:", error)
try:
    import esci_nb
except ImportError as error:
    print("BARE:", error)
END
run() {{ {python} -m papermill --log-level ERROR --no-progress-bar "$@" 2>&1; }}
run {notebook} {work}/ample.ipynb -p input_folder {input} -p output_folder {work}/ample -p hours 1 -p package_pattern tiny & ample=$!
run {notebook} {work}/short.ipynb -p input_folder {input} -p output_folder {work}/short -p hours 0.1 -p package_pattern heavy & short=$!
wait $ample
wait $short
"""


def needs_namespace() -> str:
    "Why this machine cannot run the test, '' where it can."
    if not shutil.which("unshare"):
        return "there is no unshare command"
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"unshare -rnm is not permitted here ({tried.stderr.strip()})"


WHY_NOT = needs_namespace()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it is permitted")


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> Path:
    "The folder in which the notebook was run twice: with ample time, and with models that are too large for the time."
    home = tmp_path_factory.mktemp("kaggle")
    titles = competition_files(home / "input" / "esci-data")["product_title"]
    runs = [tiny_run(home / "runs" / name, titles, cv, locales, seed)
            for seed, (name, cv, locales) in enumerate([("strong", 0.85, ("us", "es", "jp")), ("weak", 0.80, ("us", "es", "jp")),
                                                        ("english", 0.83, ("us",))])]
    assert main(["pack", *map(str, runs), "--to", str(home / "input" / "packed" / "tiny")]) == 0
    # the same package, whose weaker models claim to be a hundred million times as much work
    heavy = home / "input" / "packed" / "heavy"
    shutil.copytree(home / "input" / "packed" / "tiny", heavy)
    manifest = json.loads((heavy / "manifest.json").read_text())
    for entry in manifest["models"]:
        entry["work"] *= 1 if entry["name"] == "strong" else 10**8
    (heavy / "manifest.json").write_text(json.dumps(manifest))
    (home / "input" / "others").mkdir()
    (home / "input" / "others" / "manifest.json").write_text('{"name": "something else"}')
    (home / "input" / "others" / "sample_submission.csv").write_text("product_id,query_id\nB0,1\n")

    venv = home / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    inside = next((venv / "lib").glob("python3*")) / "site-packages"
    (inside / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (home / "elsewhere").mkdir()
    (home / "work").mkdir()
    script = INSIDE.format(input=home / "input", python=venv / "bin" / "python", elsewhere=home / "elsewhere", work=home / "work",
                           notebook=home / "input" / "packed" / "tiny" / "submission.ipynb")
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "OMP_NUM_THREADS")}
    clean |= {"HOME": str(home / "elsewhere"), "IPYTHONDIR": str(home / "elsewhere" / ".ipython")}
    done = subprocess.run([*NAMESPACE, "sh", "-c", script], env=clean, capture_output=True, text=True, timeout=400)
    (home / "said").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return home


def said_in(notebook: Path) -> str:
    "Everything that the cells of a notebook printed or showed."
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_it_was_cut_off(lived):
    said = (lived / "said").read_text()
    assert "NO NETWORK:" in said and "READ ONLY:" in said and "BARE: No module named 'esci_nb'" in said


@pytest.mark.parametrize("name", ["ample", "short"])
def test_the_file_is_valid_and_alone(lived, name):
    candidates = read_candidates(lived / "input" / "esci-data" / "test_public-v0.3.csv.zip")
    assert check_submission(lived / "work" / name / "submission.csv", candidates)["rows"] == len(candidates)
    assert [path.name for path in (lived / "work" / name).iterdir()] == ["submission.csv"]
    said = said_in(lived / "work" / f"{name}.ipynb")
    assert "installed from" in said and str(ROOT / "esci_nb") not in said and "100.0% of them ranked by models" in said


def test_ample_time_uses_all_models_and_short_time_drops_the_weak(lived):
    ample, short = (said_in(lived / "work" / f"{name}.ipynb") for name in ("ample", "short"))
    assert ample.count(" used ") == 3 and "dropped" not in ample
    assert short.count(" used ") == 1 and "to be dropped: english, weak" in short and "weak: dropped, about" in short
    ranked = [pd.read_csv(lived / "work" / name / "submission.csv") for name in ("ample", "short")]
    assert not ranked[0].equals(ranked[1]) and sorted(ranked[0]["product_id"]) == sorted(ranked[1]["product_id"])


def test_nothing_was_left_in_the_input_or_the_working_folder(lived):
    assert not [path for path in (lived / "input").rglob("*") if "__pycache__" in path.parts or path.name.endswith(".part")]
    assert all(path.name.startswith(".") for path in (lived / "elsewhere").iterdir()), "nothing but what Jupyter keeps in a home"
