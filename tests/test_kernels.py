"""Kernels out of a warm process: fast, fresh, and gone with whoever wanted them."""
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import ROOT
from kill_grid import is_kernel
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from esci_nb.run import kernels
from esci_nb.run.kernels import WarmProcess, own_kernel

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
LIBRARIES = "print(*(name in sys.modules for name in ('torch', 'transformers.trainer', 'esci_nb.recipe')))"


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Runs one line in a kernel out of a warm process of its own; gives what it printed."
    warm = WarmProcess()
    monkeypatch.setattr(kernels, "_WARM", warm)

    def one(line: str) -> list[str]:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"import os, random, sys, time\n{line}")])
        NotebookClient(notebook, kernel_name="python3", kernel_manager_class=own_kernel(tmp_path / "log")).execute()
        return notebook.cells[0].outputs[0].text.split() if notebook.cells[0].outputs else []
    one.warm = warm
    yield one
    warm.close()


@linux
def test_kernels_come_out_of_one_warm_process_with_its_libraries_and_without_ours(run, monkeypatch):
    assert run(LIBRARIES) == ["False", "False", "False"]
    one, two, *loaded = run(f"print(os.getppid(), random.random()); {LIBRARIES}")
    again, other = run("print(os.getppid(), random.random())")
    assert one == again == str(run.warm.process.pid) and two != other and loaded == ["True", "True", "False"]
    before = psutil.Process(run.warm.process.pid)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    parent, threads = run("print(os.getppid(), os.environ['OMP_NUM_THREADS'])")
    assert parent != again and threads == "3" and not before.is_running()


@linux
def test_a_kernel_is_as_if_started_anew(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_the_stage.py").write_text("value = 5")
    (tmp_path / "random.py").write_text("raise ValueError")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "more")]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "of_the_stage.py").write_text("value = 6")
    said = run("import of_the_stage; os.write(1, b'aside'); print(of_the_stage.value, os.getcwd(), os.getpgid(0) == os.getpid(), sys.stdin.read() == '')")
    assert said[:3] == ["6", str(tmp_path), "True"] and (tmp_path / "log").read_text().endswith("aside")


@linux
def test_a_kernel_that_dies_and_a_warm_process_that_dies(run):
    with pytest.raises(DeadKernelError):
        run("os.kill(os.getpid(), 9)")
    assert run.warm.kernel.poll() == -signal.SIGKILL
    with pytest.raises(DeadKernelError):
        run("os.kill(os.getppid(), 9); time.sleep(60)")
    assert run("print(os.getppid())") == [str(run.warm.process.pid)]
    run.warm.process.kill()
    run.warm.process.wait()
    assert run("print(os.getppid())") == [str(run.warm.process.pid)]


@linux
def test_a_second_kernel_at_the_same_time_is_a_new_python(run, tmp_path):
    first = run.warm.fork([sys.executable, "-f", str(tmp_path / "connection.json")], os.environ, tmp_path / "log")
    assert first.poll() is None and run("print(os.getppid())") == [str(os.getpid())]
    first.terminate()
    assert first.wait() == first.poll() != 0
    first.kill()  # it is over: nothing happens


@linux
def test_a_library_that_cannot_be_loaded_costs_no_kernel(run, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'wait_for_work' in str(sys.orig_argv): sys.modules['pandas'] = None")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run("print(os.getppid())") == [str(os.getpid())] and run.warm.process is None


@linux
def test_a_process_that_has_touched_a_gpu_starts_python_anew(run, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("""import sys
if 'wait_for_work' in str(sys.orig_argv):
    import torch
    torch.cuda._is_in_bad_fork = lambda: True
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parent, loaded = run("print(os.getppid(), 'torch' in sys.modules)")
    assert parent == str(run.warm.process.pid) and loaded == "False"


@linux
def test_no_process_is_left_of_a_killed_command(tmp_path, tiny_files):
    command = subprocess.Popen([sys.executable, "-P", "-c", "import sys; from esci_nb.cli import main; sys.exit(main(sys.argv[1:]))", "run", "preprocess",
                                "--set", f"source={tiny_files}", "n_folds=2"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stdout=subprocess.DEVNULL)
    family, deadline = [], time.monotonic() + 60
    while not any(map(is_kernel, family)) and time.monotonic() < deadline:
        family = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    assert len(family) == 2 and not psutil.wait_procs(family, timeout=10)[1]
