"""Many runs: the grid file and its plan, workers, locks, and runs that read some locales only."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import QUICK, ROOT, written
from kill_grid import is_kernel

from esci_nb.cli import main
from esci_nb.contract import LOCALES, InputError
from esci_nb.data.prepare import DataSettings
from esci_nb.files import folder_lock, is_locked, write_json
from esci_nb.folders import open_data, read_run, save_data
from esci_nb.identity import backbone_id
from esci_nb.recipe import make_run
from esci_nb.run import workers
from esci_nb.run.costs import calibrate, plan_costs, read_costs, wall_hours
from esci_nb.run.plan import Grid, change_grid, plan_runs, read_grid
from esci_nb.run.stages import Job, data_path
from esci_nb.run.workers import OneMachine, run_jobs, worker_slots
from esci_nb.strategy.distill import locales_of, read_soft_labels, read_teachers
from esci_nb.strategy.pseudo import pseudo_predictions

WWW = ROOT / "nbs" / "grids" / "www.toml"
QUICK_WORDS = [f"{name}={value}" for name, value in QUICK.items()]


def python(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **options)


def wait_for(what, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def data(tmp_path) -> Path:
    "A finished data folder of 12 us and 6 jp train rows and some test rows, without text."
    rows = pd.DataFrame({"query_id": range(24), "query": [f"query {i}" for i in range(24)], "source": "task1",
                         "product_locale": ["us", "us", "us", "us", "jp", "jp"] * 4, "split": ["train"] * 18 + ["test"] * 6})
    rows["fold"] = np.where(rows["split"] == "train", rows.index // 6, -1)
    folder = tmp_path / "outputs" / "data" / "tiny"
    save_data(folder, rows, rows[["product_locale"]], {"n_folds": 3, "source": "tiny"})
    (folder / "DONE").touch()
    return folder


# The winning file, small and real

def test_winning_file_runs_small_on_us_rows_with_two_workers(made, tiny_files, capsys):
    outputs = made.data.parents[1]
    words = ["grid", str(WWW), str(tiny_files), "--backbones", "small", "--recipes", "www", "--folds", "0", "--n-folds", "2",
             "--data-set", "markers=false", "--outputs", str(outputs), "--set", *QUICK_WORDS, "locales=us"]
    assert main([*words, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "6 jobs, 0 of them done; 1 runs are wanted, 3 more teach them" in planned and "hours of work" in planned
    assert main([*words, "--workers", "2"]) == 0
    answer = capsys.readouterr()
    assert "no ensemble www: no run reads es, jp" in answer.err
    assert answer.out.strip().split("\n")[-1].split()[0] == "www", "the last line is the row of the model"
    student, = outputs.glob("runs/www-*")
    data = open_data(made.data, ["us"])
    run = read_run(student)
    assert run.name == "www" and run.recipe.locales == ("us",) and json.loads((student / "config.json").read_text())["covers"] == ["us"]
    oof, test = (pd.read_parquet(student / f"{part}.parquet") for part in ("oof", "test"))
    assert set(oof["product_locale"]) == set(test["product_locale"]) == {"us"}
    assert sorted(oof["example_id"]) == sorted(data.rows["example_id"].iloc[data.held_out(0)])
    assert sorted(test["example_id"]) == sorted(data.rows["example_id"].iloc[data.test])
    teachers = sorted(outputs.glob("runs/www_first-*-f0t*"))
    assert len(teachers) == 3 and all((teacher / "DONE").exists() and locales_of([teacher]) == ("us",) for teacher in teachers)
    own, labelled = set(oof["query_id"]), []
    for teacher in teachers:
        inner = pd.read_parquet(teacher / "inner.parquet")
        assert not own & set(inner["query_id"]) and set(pd.read_parquet(teacher / "oof.parquet")["query_id"]) == own
        labelled += inner["example_id"].tolist()
    assert sorted(labelled) == sorted(data.rows["example_id"].iloc[data.train(0)])
    soft_labels = outputs / "soft_labels" / run.soft_labels
    soft = pd.read_parquet(soft_labels / "soft.parquet")
    assert sorted(soft["example_id"]) == sorted(labelled) and set(soft["fold"]) == {0}
    pseudo = pd.read_parquet(outputs / "pseudo_labels" / run.pseudo_labels / "pseudo.parquet")
    assert set(pseudo["example_id"]) <= set(test["example_id"])
    metrics = json.loads((student / "metrics.json").read_text())
    assert metrics["train_rows"] == len(data.train(0)) and metrics["pseudo_rows"] == (pseudo["fold"] == 0).sum()
    assert not list(outputs.rglob("LOCK"))
    # everything is done, and the plan knows it
    assert main([*words, "--plan"]) == 0 and "6 jobs, 6 of them done" in capsys.readouterr().out
    before = written(outputs)
    assert main(words) == 0 and capsys.readouterr().out.strip().split("\n")[-1].split()[0] == "www" and written(outputs) == before
    # labels of us rows are for us students
    with pytest.raises(InputError, match="soft labels for us and not for all locales"):
        read_soft_labels(soft_labels, open_data(made.data), 0)
    for read in (read_teachers, pseudo_predictions):
        with pytest.raises(InputError, match="trained on us and not on all locales"):
            read(teachers, open_data(made.data))


def test_finished_runs_make_their_ensemble(made, tiny_files, tmp_path, capsys):
    (tmp_path / "grid.toml").write_text('[data]\nn_folds = 2\n[[backbone]]\nname = "small"\n[[ensemble]]\nname = "mean"\n')
    before = written(made.data.parents[1])
    assert main(["grid", str(tmp_path / "grid.toml"), str(tiny_files), "--outputs", str(made.data.parents[1]), "--set", *QUICK_WORDS]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[-1] == str(made.ensemble) and lines[-2].split()[0] == "baseline" and len(lines) == 3
    assert before == written(made.data.parents[1])


def test_ctrl_c_stops_all_workers(made, tiny_files):
    outputs = made.data.parents[1]
    words = ["grid", str(tiny_files), "--backbones", "small", "--n-folds", "2", "--seeds", "8", "--workers", "2", "--outputs", str(outputs),
             "--set", *QUICK_WORDS, "epochs=90"]
    words.remove(f"epochs={QUICK['epochs']}")
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a suite started in the background ignores Ctrl-C
    grid = python(f"{hear}; import sys; from esci_nb.cli import main; sys.exit(main({words!r}))", stdout=subprocess.DEVNULL,
                  stderr=subprocess.PIPE, text=True)
    family = []
    try:
        def kernels() -> int:
            found = 0
            for one in psutil.Process(grid.pid).children(recursive=True):
                found += is_kernel(one)
                family.append(one)
            return found
        wait_for(lambda: kernels() == 2)
        folders = [path.parent for path in outputs.glob("runs/*-s8-*/LOCK")]
        assert len(folders) == 2 and all(map(is_locked, folders))
        grid.send_signal(signal.SIGINT)
        _, said = grid.communicate(timeout=60)
        assert grid.returncode == 130 and "goes on where it stopped" in said and "Traceback" not in said
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert not any(map(is_locked, folders)) and not any((folder / "DONE").exists() for folder in folders)
    finally:
        for one in (*family, grid):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


# Locks

def test_lock_of_a_killed_owner_is_taken_over(tmp_path):
    code = ("import sys, time; from esci_nb.files import folder_lock\n"
            f"with folder_lock({str(tmp_path / 'run')!r}): print('mine', flush=True); time.sleep(60)")
    owner = python(code, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "mine\n" and is_locked(tmp_path / "run")
    assert (tmp_path / "run" / "LOCK").read_text() == f"{owner.pid}\n"
    owner.kill()
    owner.wait()
    assert (tmp_path / "run" / "LOCK").exists() and not is_locked(tmp_path / "run")
    with folder_lock(tmp_path / "run"):
        assert (tmp_path / "run" / "LOCK").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "run" / "LOCK").exists()


def test_many_owners_one_at_a_time(tmp_path):
    code = ("import os, time; from pathlib import Path; from esci_nb.files import folder_lock\n"
            f"folder, inside = Path({str(tmp_path / 'run')!r}), Path({str(tmp_path / 'inside')!r})\n"
            "for _ in range(40):\n"
            "    with folder_lock(folder):\n"
            "        os.close(os.open(inside, os.O_CREAT | os.O_EXCL)); time.sleep(0.001); inside.unlink()")
    owners = [python(code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [owner.communicate(timeout=120)[1] for owner in owners] == [""] * 2
    assert [owner.returncode for owner in owners] == [0] * 2


def test_two_callers_of_one_stage_run_it_once(made, tmp_path):
    code = ("from pathlib import Path; from esci_nb.run.stages import combine\n"
            f"combine([Path(run) for run in {[str(run) for run in made.runs]!r}], Path({str(made.data)!r}), name='twice', "
            f"outputs=Path({str(tmp_path)!r}))")
    callers = [python(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [caller.communicate(timeout=240)[0] for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0], said
    assert sum("members: " in text for text in said) == 1 and sum("is at work on it; waiting" in text for text in said) <= 1
    folder, = (tmp_path / "ensembles").iterdir()
    assert (folder / "DONE").exists() and not (folder / "LOCK").exists() and not list(folder.glob(".*part"))


# Workers

class Toy:
    "A worker that needs three looks; the job `bad` fails."
    running, most, order = 0, 0, []

    def __init__(self, job, process):
        self.job, self.looks, self.failure, self.is_over = job, 0, None, False
        Toy.running += 1
        Toy.most = max(Toy.most, Toy.running)
        Toy.order.append(job.folder.name)

    def ended(self):
        self.looks += 1
        if self.looks == 3:
            Toy.running -= 1
            self.failure = RuntimeError("it broke") if self.job.folder.name == "bad" else None
        self.is_over = self.looks == 3
        return self.is_over

    def stop(self):
        Toy.order.append(f"stop {self.job.folder.name}")


@pytest.fixture
def toys(tmp_path, monkeypatch):
    "Makes jobs from names and needs; they are run by `Toy`."
    monkeypatch.setattr(workers, "Worker", Toy)
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    Toy.running, Toy.most, Toy.order = 0, 0, []
    return lambda **needs: [Job("toy", tmp_path / name, {}, tuple(tmp_path / need for need in after.split())) for name, after in needs.items()]


def test_jobs_wait_for_their_needs_and_failures_stay_alone(toys, tmp_path):
    jobs = toys(a="", bad="", b="a", c="bad b", d="c", e="")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "DONE").touch()
    failed = run_jobs(jobs, OneMachine(slots=[{"OMP_NUM_THREADS": "1"}] * 2))
    assert Toy.order == ["a", "bad", "b"] and Toy.most == 2
    assert {folder.name: str(error).split(",")[0] for folder, error in failed.items()} == {
        "bad": "it broke", "c": "c was not run: it needs bad", "d": "d was not run: it needs c"}


def test_a_job_of_another_grid_is_left_to_it(toys, tmp_path, monkeypatch):
    looks = []

    def locked(folder):
        looks.append(folder.name)
        if len(looks) > 6:
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / "DONE").touch()
        return folder.name == "a"
    monkeypatch.setattr(workers, "is_locked", locked)
    assert not run_jobs(toys(a="", b="", c="a"), OneMachine(slots=[{"OMP_NUM_THREADS": "1"}]))
    assert Toy.order == ["b", "c"]


def test_an_ordinary_kill_stops_the_workers_too(toys, monkeypatch):
    monkeypatch.setattr(Toy, "ended", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(toys(a="", b=""), OneMachine(slots=[{"OMP_NUM_THREADS": "1"}] * 2))
    assert Toy.order == ["a", "b", "stop a", "stop b"] and signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_is_ignored_stays_ignored(toys, monkeypatch):
    "Under nohup, closing the terminal does not end the grid."
    monkeypatch.setattr(Toy, "ended", lambda self: os.kill(os.getpid(), signal.SIGHUP) is None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not run_jobs(toys(a="", b="a"), OneMachine(slots=[{"OMP_NUM_THREADS": "1"}] * 2))
        assert Toy.order == ["a", "b"] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("deaths, lost", [(1, []), (2, []), (3, ["a", "b"])])
def test_a_worker_that_is_killed_is_replaced_twice(toys, monkeypatch, deaths, lost):
    def ended(self):
        self.failure = workers.Died("killed") if Toy.order.count("a") <= deaths and self.job.folder.name == "a" else None
        self.is_over = True
        return True
    monkeypatch.setattr(Toy, "ended", ended)
    failed = run_jobs(toys(a="", b="a"), OneMachine(slots=[{"OMP_NUM_THREADS": "1"}]))
    assert [folder.name for folder in failed] == lost and Toy.order == ["a"] * min(deaths + 1, 3) + ["b"] * (not lost)


def test_a_worker_says_in_its_log_what_it_printed(tmp_path):
    job = Job("report", tmp_path / "outputs" / "report" / "x", {"data": str(tmp_path), "ensemble": str(tmp_path)})
    process = workers.WorkerProcess({"OMP_NUM_THREADS": "1"})
    worker = workers.Worker(job, process)
    process.process.kill()
    wait_for(worker.ended)
    process.end()
    assert isinstance(worker.failure, workers.Died) and str(worker.log) in str(worker.failure) and worker.log.parent == tmp_path / "outputs" / "logs"


def test_a_worker_process_does_jobs_one_after_the_other_and_keeps_what_each_printed(tiny_files, tmp_path):
    process, said = workers.WorkerProcess({"OMP_NUM_THREADS": "1"}), []
    for number in (1, 2):
        folder = data_path(str(tiny_files), DataSettings(n_folds=1 + number), tmp_path / "outputs")
        worker = workers.Worker(Job("preprocess", folder, {"source": str(tiny_files), "n_folds": 1 + number, "outputs": str(tmp_path / "outputs")}), process)
        wait_for(worker.ended)
        assert worker.failure is None and (folder / "DONE").is_file()
        said.append((process.process.pid, worker.log.read_text().count(f"rows and 1,277 products in {folder}")))
    process.end()
    assert said[0] == said[1] and said[0][1] == 1 and not process.folder.exists()


def test_any_error_of_a_job_is_one_sentence():
    class Odd:
        stage, folder = "train", Path("outputs/runs/odd")

        def run(self):
            raise KeyError("two\nlines")
    assert "\n" not in str(workers.Here(Odd()).failure) and "KeyError" in str(workers.Here(Odd()).failure)


def test_worker_brings_back_what_went_wrong(tmp_path):
    before = set(Path(tempfile.gettempdir()).glob("esci_nb-worker-*"))
    job = Job("ensemble", tmp_path / "out", {"weigths": 1})
    place = OneMachine(slots=[{"OMP_NUM_THREADS": "1"}])
    failed = run_jobs([job], place)
    place.close()
    assert isinstance(failed[job.folder], InputError) and "has no parameter 'weigths'" in str(failed[job.folder])
    assert not job.folder.exists() and not set(Path(tempfile.gettempdir()).glob("esci_nb-worker-*")) - before


def test_one_worker_per_gpu(monkeypatch):
    import torch
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in worker_slots()] == ["0", "1", "2"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in worker_slots(1)] == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in worker_slots()] == ["5", "7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in worker_slots(3)] == ["5", "7", "5"], "small models share a GPU"
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in worker_slots(1, 2)] == ["5,7"]
    for count, each, most in ((17, 1, 16), (2, 2, 1)):
        with pytest.raises(InputError, match=f"{count} workers were asked for and there are 2 GPUs; give at most {most}"):
            worker_slots(count, each)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert worker_slots() == worker_slots(1) == [{}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert worker_slots() == [{}] and worker_slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    with pytest.raises(InputError, match="0 workers"):
        worker_slots(0)


# Plans and costs

def test_winning_file_names_what_there_is():
    www = read_grid(WWW)
    assert {table["name"]: table for table in www.backbone}["microsoft/deberta-v3-large"]["locales"] == ["us"] and len(www.backbone) == 4
    assert www.recipes == ("www_first", "www") and [table["name"] for table in www.ensemble] == ["www_first", "www"]
    small = change_grid(www, ["x"], ["www"], None, [1], {"n_folds": 2}, epochs=1)
    assert small.backbone == ({"name": "x", "epochs": 1},) and small.data["n_folds"] == 2 and small.ensemble == ({"name": "www", "recipes": ["www"]},)


def test_fields_of_one_recipe_win_and_reach_its_teachers(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text('recipes = ["awp", "www"]\n[recipe]\nepochs = 1\nawp_below = 0.5\n[recipe.awp]\nawp_below = 0.9\n'
                    '[recipe.www_first]\nepochs = 3\n[[backbone]]\nname = "m"\nawp_below = 0.7\n')
    grid = read_grid(path)
    def trained(grid: Grid) -> set:
        return {(run.name, run.recipe.epochs, run.recipe.awp_below) for run in plan_runs(grid, data, data.parents[1]).training.values()}
    assert trained(grid) == {("awp", 1, 0.9), ("www", 1, 0.7), ("www_first", 3, 0.7)}
    assert trained(change_grid(grid, awp_below=0.2)) == {("awp", 1, 0.2), ("www", 1, 0.2), ("www_first", 3, 0.2)}
    ladder = read_grid(ROOT / "nbs" / "grids" / "ladder.toml")
    assert ladder.data["over"] == "ranked" and len(ladder.seeds) == 3 and {"baseline", "www"} < set(ladder.recipes)


def test_a_grid_file_wins_over_the_fields_that_suit_small(data, monkeypatch):
    from esci_nb.run import grid as grids
    monkeypatch.setattr(grids, "preprocess", lambda source, outputs, **settings: data)
    monkeypatch.setattr(grids, "find_backbone", lambda name, data, outputs: ("built/small", {"epochs": 3, "max_length": 64, "lr": 5e-4}))
    grid = Grid(backbone=[{"name": "small", "lr": 1e-4}], recipes=["baseline", "awp"], recipe={"epochs": 5, "awp": {"max_length": 32}})
    trained = grids.plan_grid(grid, "sample", data.parents[1]).training.values()
    assert {(run.name, run.backbone, run.recipe.epochs, run.recipe.max_length, run.recipe.lr) for run in trained} == {
        ("baseline", "built/small", 5, 64, 1e-4), ("awp", "built/small", 5, 32, 1e-4)}


def test_what_ensembles_read_is_checked_before_the_first_run(data, tmp_path):
    from esci_nb.run.grid import check_ensembles
    rows = open_data(data).rows
    keys = rows.assign(score=1.0)[["query_id", "product_locale", "score"]].assign(product_id="a")
    rows.assign(example_id=rows.index, product_id="a").to_parquet(data / "rows.parquet")
    keys.to_csv(tmp_path / "whole.csv", index=False)
    keys.iloc[1:].to_csv(tmp_path / "lacks.csv", index=False)
    keys.assign(score="many").to_csv(tmp_path / "words.csv", index=False)
    backbone = [{"name": "some/model"}]
    plan = plan_runs(Grid(backbone=backbone), data, data.parents[1])
    for scores, named in (("whole.csv", None), ("lacks.csv", "lack"), ("words.csv", "finite"), ("none.csv", "no file")):
        grid = Grid(backbone=backbone, ensemble=[{"name": "x", "scores": {"peer": str(tmp_path / scores)}, "leaderboard": {"peer": 0.9}}])
        if named is None:
            check_ensembles(grid, plan)
        else:
            with pytest.raises(InputError, match=named):
                check_ensembles(grid, plan)
    with pytest.raises(InputError, match="cannot be the name"):
        Grid(backbone=backbone, ensemble=[{"name": "../x"}])


def test_plan_shares_teachers_and_keeps_locales_apart(data):
    grid = Grid(backbone=[{"name": "some/model"}, {"name": "english", "locales": ["us"]}], recipes=["www_first", "www", "distill"], folds=[0, -1])
    plan = plan_runs(grid, data, data.parents[1])
    assert len(plan.runs) == 12 and len({job.folder for job in plan.jobs}) == len(plan.jobs)
    places = {job.folder: number for number, job in enumerate(plan.jobs)}
    assert all(places[need] < places[job.folder] for job in plan.jobs for need in job.needs)
    for job in plan.jobs:
        run = plan.training.get(job.folder)
        if run is not None:
            assert run.recipe.locales == (("us",) if run.backbone == "english" else ())
            teachers = [plan.training[teacher] for need in job.needs for other in plan.jobs if other.folder == need for teacher in other.needs]
            assert all((teacher.backbone, teacher.recipe.locales) == (run.backbone, run.recipe.locales) for teacher in teachers)
    # of each backbone: www_first 0 and -1; its folds for the final students; three teachers of www and of distill; four students
    kinds = [run for run in plan.training.values() if run.backbone == "english"]
    assert sorted((one.name, one.fold, one.teacher) for one in kinds) == sorted(
        [("www_first", fold, -1) for fold in (-1, 0, 1, 2)] + [("baseline", fold, -1) for fold in range(3)]
        + [(name, 0, teacher) for name in ("www_first", "baseline") for teacher in range(3)]
        + [(name, fold, -1) for name in ("www", "distill") for fold in (0, -1)])


def test_hours_follow_from_rows_and_rate(data):
    costs = read_costs()
    backbones = [{"name": "m", "epochs": 3}, {"name": "us-m", "epochs": 3, "locales": "us"}]
    plan = plan_runs(Grid(backbone=backbones, recipes=["baseline", "fgm", "www"], folds=[1]), data, data.parents[1])
    table = plan_costs(plan, {"": 10.0, "us-m": 20.0}, costs)

    def part(recipe: str, backbone: str) -> pd.DataFrame:
        return table[(table["recipe"] == recipe) & (table["backbone"] == backbone)]
    one = part("fgm", "m").iloc[0]
    assert (one["rows"], one["predicted"], one["passes"]) == (12, 12, 36)
    assert np.isclose(one["hours"] * 3600 * 10, 36 * costs.steps["FGMTraining"] + 12 * costs.predict)
    assert part("baseline", "us-m")[["rows", "predicted", "pairs/s"]].to_numpy().tolist() == [[8, 8, 20]]
    soup = plan_costs(plan_runs(Grid(backbone=[{"name": "m", "soup": 3}], recipes=["baseline"], folds=[1], recipe={"epochs": 2}), data, data.parents[1]), {"": 10.0}, costs)
    assert soup["passes"].tolist() == [3 * 2 * 12]
    teachers = part("www_first", "m")
    assert teachers["rows"].sum() == 2 * 12 and (teachers["rows"] + teachers["predicted"] == 12 + 6 + 6).all()
    assert part("www", "m")["rows"].item() == 12 + 6  # every test row may become a pseudo label
    jobs = plan_costs(plan, {"": 10.0}, costs)
    assert np.isclose(wall_hours(plan, jobs, 1), jobs["hours"].sum())
    chain = jobs[jobs["round"] == "teachers"]["hours"].max() + jobs[jobs["round"] == "second"]["hours"].max()
    assert np.isclose(wall_hours(plan, jobs, 50), chain) and wall_hours(plan, jobs, 2) < jobs["hours"].sum()


def test_rate_of_finished_runs_and_of_the_benchmark(data):
    costs, outputs = read_costs(), data.parents[1]
    backbones = [{"name": "cross-encoder/ms-marco-MiniLM-L12-v2"}, {"name": "google/rembert", "gradient_checkpointing": True}]
    grid = Grid(backbone=backbones, recipes=["awp"], folds=[0])
    plan = plan_runs(grid, data, outputs)
    first = plan_costs(plan, costs=costs)
    assert first["rate from"].str.startswith("bench.csv").all() and first["pairs/s"].iloc[0] > 20 * first["pairs/s"].iloc[1] > 0
    old = make_run("awp", backbone="google/rembert", gradient_checkpointing=True)
    write_json({**old.values(), "backbone_id": backbone_id(old.backbone)}, outputs / "runs" / "old" / "config.json")
    write_json({"pairs_per_second": 100.0, "steps": 8, "attacks": 4}, outputs / "runs" / "old" / "metrics.json")
    (outputs / "runs" / "old" / "DONE").touch()
    second = plan_costs(plan, costs=costs).iloc[1]
    assert second["rate from"] == "finished runs" and np.isclose(second["pairs/s"], 100 * (1 + (costs.steps["AWPTraining"] - 1) / 2))
    unknown = plan_runs(Grid(backbone=[{"name": "no/such"}]), data, outputs)
    with pytest.raises(InputError, match="--rate no/such=PAIRS_PER_SECOND"):
        plan_costs(unknown, costs=costs)


def test_a_plan_tries_what_nobody_has_trained(made):
    backbone, = (path for path in (made.data.parents[1] / "backbones").iterdir())
    quick = {"epochs": 1, "precision": "fp32", "text_fields": "title"}
    plan = plan_runs(Grid(backbone=[{"name": str(backbone), **quick, "max_length": 24}], recipes=["baseline", "awp"], folds=[0]), made.data,
                     made.data.parents[1])
    costs = read_costs()
    tried = calibrate(plan, costs, environment={"OMP_NUM_THREADS": "1"}, seconds=0.5)
    speed, = tried.values()
    assert 10 < speed.rate < 1e5 and 0.5 < speed.start < 300 and speed.origin == "ten seconds of training here"
    table = plan_costs(plan, costs=costs, tried=tried)
    assert np.allclose(table["hours"] * 3600, speed.start + table["plain"] / speed.rate) and (table["rate from"] == speed.origin).all()
    assert calibrate(plan, costs, {"": 10.0}) == {}, "a rate is given"
    known = plan_runs(Grid(backbone=[{"name": str(backbone), **quick, "max_length": 32}], folds=[0], seeds=[7]), made.data, made.data.parents[1])
    assert calibrate(known, costs) == {}, "there are finished runs"
    took = [json.loads((run / "notebook.ipynb").read_text())["metadata"]["papermill"]["duration"]
            for run in made.data.parents[1].glob("runs/*") if (run / "notebook.ipynb").is_file()]
    speed, = plan_costs(known, costs=costs)["start"]
    assert 0 < speed < max(took)


MISTAKES = {
    "fields of no recipe": ('[recipe.magic]\nepochs = 1\n[[backbone]]\nname = "x"', "magic"),
    "no such file": (None, "/no/such.toml"),
    "no toml": ("recipes = [", "not valid TOML"),
    "unknown key": ("recipe_names = ['www']", "recipe_names"),
    "unknown key of a backbone": ("[[backbone]]\nname = 'a'\nbatchsize = 3", "batchsize"),
    "unknown key of the data": ("[data]\nfolds = 3\n[[backbone]]\nname = 'a'", "folds"),
    "unknown key of an ensemble": ("[[backbone]]\nname = 'a'\n[[ensemble]]\nname = 'x'\nweigths = 1", "weigths"),
    "unknown recipe": ("recipes = ['wwww']\n[[backbone]]\nname = 'a'", "wwww"),
    "unknown locale": ("[[backbone]]\nname = 'a'\nlocales = ['uk']", "uk"),
    "what the grid fills in": ("[recipe]\nteacher = 1\n[[backbone]]\nname = 'a'", "teacher"),
    "ensemble of an untrained recipe": ("[[backbone]]\nname = 'a'\n[[ensemble]]\nname = 'x'\nrecipes = ['www']", "www"),
    "a list that is none": ("folds = 1\n[[backbone]]\nname = 'a'", "folds"),
    "a backbone twice": ("[[backbone]]\nname = 'a'\n[[backbone]]\nname = 'a'", "twice"),
    "no backbone": ("recipes = ['www']", "backbones"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_file(mistake, tmp_path, capsys):
    text, named = MISTAKES[mistake]
    path = Path("/no/such.toml") if text is None else tmp_path / "grid.toml"
    if text is not None:
        path.write_text(text)
    assert main(["grid", str(path), "sample", "--outputs", str(tmp_path / "outputs")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("esci-nb: ") and named in said and "\n" not in said and said.endswith(".")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("words, named", [(["--rate", "fast"], "fast"), (["--workers", "0"], "0 workers"), (["--set", "seed=3"], "seed")])
def test_mistakes_on_the_command_line(words, named, tmp_path, capsys):
    assert main(["grid", "sample", "--backbones", "x", "--outputs", str(tmp_path / "outputs"), "--plan", *words]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "outputs").exists()


def test_data_without_the_locale(data):
    grid = Grid(backbone=[{"name": "m", "locales": "es"}])
    with pytest.raises(InputError, match="no train rows of the locale 'es'; it has jp, us"):
        plan_runs(grid, data, data.parents[1])
    us = open_data(data, ["us"])
    assert set(us.rows["product_locale"]) == {"us"} and us.locales == ("us",) and len(us.rows) == 16 and set(LOCALES) > {"us"}
