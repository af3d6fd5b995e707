"The same jobs elsewhere: packed jobs, machines that cannot work, Slurm's executor on this machine, and Ray where it is installed."
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import two_hosts

from esci_nb.contract import InputError
from esci_nb.data.folds import make_folds
from esci_nb.data.load import load
from esci_nb.data.merge import merge_tasks
from esci_nb.data.prepare import DataSettings, Processes, prepare_tables
from esci_nb.files import size_and_sum
from esci_nb.run.clusters import Needs, RayCluster, RayParts, Slurm, make_parts, pack_job, unpack_job, why_not_here
from esci_nb.run.stages import Job
from esci_nb.run.workers import run_jobs


LONG = "minutes long: TWO_HOSTS=1" if "TWO_HOSTS" not in os.environ else two_hosts.why_not()


@dataclass
class Prepared:
    "A plan's data folder, as far as places ask for it."
    path: Path


@dataclass
class Plan:
    "A plan without runs, as far as places ask for it."
    outputs: Path
    data: Prepared
    training: dict = field(default_factory=dict)


@pytest.fixture
def plan(tmp_path) -> Plan:
    folder = tmp_path / "outputs" / "data" / "tiny-1"
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    return Plan(tmp_path / "outputs", Prepared(folder))


def test_a_job_moves_with_its_outputs_and_only_with_them():
    job = Job("train", Path("/a/outputs/runs/x"), {"data": "/a/outputs/data/d", "outputs": "/a/outputs", "backbone": "/a/outputs2/m", "seed": 1,
                                                   "overrides": {"text_fields": ["/a/outputs/no", "title"]}})
    moved = unpack_job(pack_job(job, Path("/a/outputs")), Path("/b"))
    assert moved.folder == Path("/b/runs/x") and moved.parameters == {
        "data": "/b/data/d", "outputs": "/b", "backbone": "/a/outputs2/m", "seed": 1, "overrides": {"text_fields": ["/b/no", "title"]}}


@pytest.mark.parametrize("place", ["slurm", "ray"])
def test_jobs_run_at_a_place_and_leave_nothing_but_their_logs(place, plan, monkeypatch):
    pytest.importorskip({"slurm": "submitit", "ray": "ray"}[place])
    (plan.outputs / "runs" / "done").mkdir(parents=True)
    (plan.outputs / "runs" / "done" / "DONE").touch()
    jobs = [Job("train", plan.outputs / "runs" / "wrong", {"no_such": 1}),
            Job("train", plan.outputs / "runs" / "after", {}, (plan.outputs / "runs" / "wrong",)),
            Job("train", plan.outputs / "runs" / "done", {})]
    cluster = Slurm({"timeout_min": 5, "gpus_per_node": 0}, "local") if place == "slurm" else RayCluster(workers=2)
    try:
        cluster.open(plan)
        assert why_not_here(cluster.needs) == ""
        if place == "ray":
            lacks = {"data": "tiny-2", "code": "older", "backbones": {"/no/such/model": "0123"}, "token": ".shared-2"}
            for name, value in lacks.items():
                with pytest.raises(InputError, match=r"The machine .* cannot work: (it|its) "):
                    cluster._ask(dataclasses.replace(cluster.needs, **{name: value}))
        failed = run_jobs(jobs, cluster)
    finally:
        cluster.close()
    assert isinstance(failed[jobs[0].folder], InputError) and "has no parameter 'no_such'" in str(failed[jobs[0].folder])
    assert "was not run: it needs wrong" in str(failed[jobs[1].folder]) and jobs[2].folder not in failed
    assert {path.name for path in plan.outputs.iterdir()} == {"data", "runs", "logs"}, "the token is gone"


def test_a_process_of_slurm_that_is_killed_is_tried_again_and_then_a_failure(plan, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr("esci_nb.run.workers.TRIES", 2)

    class Killed:
        "A task of submitit whose process left no answer."
        class paths:
            stderr = plan.outputs / "logs" / "err"

        def done(self):
            return True

        def result(self):
            raise RuntimeError("no answer")
    from esci_nb.run.clusters import _SlurmTask
    cluster, started = Slurm({"timeout_min": 5}, "local"), []
    monkeypatch.setattr(cluster, "start", lambda jobs: [started.append(job) or _SlurmTask(Killed()) for job in jobs])
    job = Job("train", plan.outputs / "runs" / "x", {})
    failed = run_jobs([job], cluster)
    assert len(started) == 2 and "ended without an answer" in str(failed[job.folder])


@pytest.mark.parametrize("change, said", [({"token": "lost"}, "does not see the outputs folder"), ({"data": "tiny-2"}, "does not see the data folder"),
                                          ({"code": "older"}, "is another version"), ({"backbones": {"/no/such": "0123"}}, "has no backbone /no/such")])
def test_a_machine_that_lacks_something_says_so_before_it_works(plan, change, said):
    from esci_nb.run.clusters import Task
    needs = dataclasses.replace(Needs.of(plan), **change)
    assert said in why_not_here(needs)
    job = Job("train", plan.outputs / "runs" / "x", {})
    answer = Task()(pack_job(job, plan.outputs), needs)
    assert answer["kind"] == "InputError" and said in answer["text"] and not (plan.outputs / "runs").exists() and not (plan.outputs / "logs").exists()


# Parts of the data

def parts_of(source, settings: DataSettings, outputs: Path, pool) -> dict:
    "The parts that a pool makes: name -> size and sum."
    make_parts(source, settings, outputs, pool, part_rows=200)
    return {path.name: size_and_sum(path) for path in outputs.rglob("*.parquet")}


def test_parts_are_the_same_whoever_makes_them_and_the_stage_joins_them(tiny_files, tmp_path):
    settings = DataSettings(markers=True)
    found = [parts_of(tiny_files, settings, tmp_path / str(workers), Processes(workers)) for workers in (1, 2)]
    assert found[0] == found[1] and len(found[0]) > 10
    parts, = (tmp_path / "2").glob("data/*/parts")
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    esci = load(tiny_files)
    rows = make_folds(merge_tasks(esci.examples))
    whole = prepare_tables(rows, esci.products, settings, tmp_path / "whole", tmp_path / "t.sqlite")
    joined = prepare_tables(rows, esci.products, settings, parts, tmp_path / "t.sqlite", part_rows=200)
    assert joined.products.equals(whole.products) and joined.rows.equals(whole.rows)
    assert before == {path: path.stat().st_mtime_ns for path in parts.iterdir()}, "no part was made again"


@pytest.mark.skipif(bool(LONG), reason=LONG)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_parts_on_ray_are_those_of_here(workers, tiny_files, tmp_path):
    import ray
    settings = DataSettings(markers=True)
    here = parts_of(tiny_files, settings, tmp_path / "here", Processes(1))
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        assert parts_of(tiny_files, settings, tmp_path / "ray", RayParts(ray, tmp_path / "ray")) == here
    finally:
        ray.shutdown()


# Two hosts

@pytest.mark.skipif(bool(LONG), reason=LONG)
@pytest.mark.parametrize("how", ["cable", "power"])
def test_a_host_that_is_lost_costs_its_runs_and_nothing_else(how, tiny_files, tmp_path):
    seen = two_hosts.run_two_hosts(tmp_path, tiny_files, how)
    assert seen["results that differ"] == 0 and seen["results"] > 40 and seen["at work on the lost host"] >= 1
    assert seen["begun"] - seen["runs"] <= seen["at work on the lost host"], "nothing but what it was at work on was begun again"
