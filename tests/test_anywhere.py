"""It works where people run it: in any folder, beside other Pythons, on a machine that refuses something, and when a kernel dies."""
import ast
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from kill_grid import is_kernel

from esci_nb.cli import main
from esci_nb.contract import InputError
from esci_nb.files import remove_empty
from esci_nb.run import stages
from esci_nb.run.stages import find_backbone, find_data, find_outputs, from_project, given_runs, machine_trouble, run_by_name, run_stage

COMMAND = [sys.executable, "-P", "-c", "import sys; from esci_nb.cli import main; sys.exit(main())"]
HERE = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    "A working folder with modules of its own, and another Python under the name python3."
    for name in ("random", "pathlib", "esci_nb", "pandas", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the working folder was imported')")
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-mine.py").write_text("import os; os._exit(3)")
    return tmp_path


def test_a_stage_runs_in_the_python_that_started_it(elsewhere, tiny_files):
    environment = HERE | {"JUPYTER_PATH": str(elsewhere), "IPYTHONDIR": str(elsewhere / "ipython")}
    done = subprocess.run([*COMMAND, "run", "PREPROCESS.IPYNB", "--set", f"source={tiny_files}", "n_folds=2"], cwd=elsewhere, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, = (elsewhere / "outputs" / "data").iterdir()
    assert str(folder.relative_to(elsewhere)) == done.stdout.strip().split("\n")[-1] and (folder / "DONE").is_file()


def test_what_a_kernel_process_says_is_not_shown(tmp_path, tiny_files):
    (tmp_path / "sitecustomize.py").write_text("""import os, random, sys
def aside(*nothing):
    os.write(1, b'an aside'), os.write(2, b'an aside')
if 'wait_for_work' in str(sys.orig_argv):
    aside()
    random.seed = aside  # what a kernel calls before it listens
""")
    done = subprocess.run([*COMMAND, "run", "preprocess", "--set", f"source={tiny_files}", "n_folds=2"], cwd=tmp_path,
                          env=HERE | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and "an aside" not in done.stdout + done.stderr, done


def test_a_full_file_system_is_one_sentence_out_of_a_notebook(tmp_path, tiny_files):
    done = subprocess.run([*COMMAND, "run", "preprocess", "--set", f"source={tiny_files}"], cwd=tmp_path, env=HERE, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "The machine refused: " in done.stderr, done.stderr
    assert not list(tmp_path.rglob("DONE"))


PLACES = {"a file as outputs": ["demo", "--data", "FILES", "--outputs", "FILE"], "a file above": ["demo", "--data", "FILES", "--outputs", "FILE/outputs"],
          "no such file system": ["demo", "--data", "FILES", "--outputs", "/proc/outputs"], "too long": ["demo", "--data", "FILES", "--outputs", "x" * 300],
          "a source too long": ["check", "x" * 300], "a submission too long": ["check", "sample", "--submission", "x" * 300],
          "a download into a file": ["download", "sample", "FILE"], "a download below a file": ["download", "sample", "FILE/a"],
          "a worker": ["grid", "FILES", "--backbones", "small", "--workers", "2", "--outputs", "FILE"]}


@pytest.mark.parametrize("place", PLACES)
def test_what_the_machine_refuses_is_one_sentence(place, tmp_path, tiny_files, capsys, monkeypatch):
    (tmp_path / "FILE").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("FILES", str(tiny_files)) for word in PLACES[place]]) == 1
    said = capsys.readouterr().err
    assert said.startswith("esci-nb: The machine refused: ") and said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize("where, code", [("/dev/full", 1), ("pipe", 1), ("closed", 0)])
def test_stdout_that_takes_nothing(where, code):
    words = f"{sys.executable} -P -c 'import sys; from esci_nb.cli import main; sys.exit(main([\"recipes\", \"www\"]))'"
    shell = {"/dev/full": f"{words} > /dev/full", "pipe": f"{words} | true; exit ${{PIPESTATUS[0]}}", "closed": f"{words} >&-"}[where]
    done = subprocess.run(["bash", "-c", shell], env=HERE, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("\n") == code and "Traceback" not in done.stderr, done.stderr


def test_memory_that_runs_out_is_one_sentence(monkeypatch, capsys):
    def eats(*args, **values):
        raise MemoryError
    monkeypatch.setattr("esci_nb.data.load.load", eats)
    assert main(["check", "sample"]) == 1 and "not enough memory" in capsys.readouterr().err
    assert machine_trouble("SafetensorError", "I/O error: No space left on device (os error 28)") and not machine_trouble("ValueError", "28")


def test_a_kernel_that_is_killed_is_started_again(tmp_path, tiny_files, monkeypatch, capfd):
    import threading
    killed = []

    def kill_one() -> None:
        while len(killed) < 2:
            for one in psutil.Process().children(recursive=True):
                if is_kernel(one) and one.pid not in killed:
                    killed.append(one.pid)
                    one.kill()
            threading.Event().wait(0.3)
    hunter = threading.Thread(target=kill_one)
    hunter.start()
    folder = stages.preprocess(str(tiny_files), outputs=tmp_path, n_folds=2)
    hunter.join()
    assert (folder / "DONE").is_file() and not (folder / "failed.ipynb").exists() and capfd.readouterr().err.count("starting it again") == 2


def test_a_refusal_leaves_the_folder_of_the_user(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "mine" / "deep" / "er"):
        with pytest.raises((InputError, RuntimeError)):
            run_stage("report", folder, {"ensemble": str(tmp_path / "in"), "data": str(tmp_path / "in")}, live=False)
        assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())
    remove_empty(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_words_for_what_is_made_on_the_spot(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(stages, "run_stage", lambda stage, folder, parameters: made.append(stage) or folder)
    monkeypatch.setattr(stages, "small_backbone", lambda data, outputs: outputs / "backbones" / "small")
    monkeypatch.chdir(tmp_path)
    assert find_outputs() == ROOT / "outputs" and find_outputs("a") == Path("a") and from_project("nbs") == ROOT / "nbs"
    assert find_data("sample", tmp_path, over="ranked") != find_data("sample", tmp_path) and made == ["preprocess"] * 2
    name, fields = find_backbone("small", Path("data"), tmp_path)
    assert name.endswith("small") and fields["max_length"] == 64 and find_backbone("a/b", Path("data")) == ("a/b", {})
    assert given_runs([], Path("data")) == [] and given_runs(["x"], Path("data")) == [Path("x")]
    with pytest.raises(InputError, match="clip"):
        run_by_name("train", {"data": "sample", "overrides": {"clip": -1}})


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "pipeline").glob("*.ipynb")), ids=lambda path: path.stem)
def test_defaults_of_a_notebook_name_nothing_that_may_be_missing(path):
    if path.stem == "submission":  # its places are Kaggle's
        return
    cell = next(cell for cell in json.loads(path.read_text())["cells"] if "parameters" in cell["metadata"].get("tags", []))
    values = {node.target.id: ast.literal_eval(node.value) for node in ast.parse("".join(cell["source"])).body}
    wanted = {"data": "sample", "source": "sample", "runs": ["demo"], "ensemble": "demo", "backbone": "small", "outputs": ""}
    if path.stem == "eda":  # it may do without
        wanted["backbone"] = ""
    assert {name: values[name] for name in wanted if name in values} == {name: wanted[name] for name in wanted if name in values}
