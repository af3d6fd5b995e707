"Curves of a training: in history.csv, and in the programs that draw them."
import sqlite3
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from esci_nb.contract import LABELS, InputError
from esci_nb.recipe import make_run
from esci_nb.strategy.base import Lists, Strategies
from esci_nb.train.fit import fit


def points_of_tensorboard(folder, run) -> dict[int, float]:
    "The losses by step that TensorBoard would draw."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / run.name))
    events.Reload()
    return {one.step: one.value for one in events.Scalars("train/loss")}


def points_of_trackio(folder, run) -> dict[int, float]:
    "The losses by step that trackio would draw."
    with sqlite3.connect(folder / "esci_nb.db") as base:
        lines = pd.read_sql("select run_name, step, metrics from metrics", base)
    values = pd.json_normalize(lines["metrics"].map(pd.io.json.ujson_loads))
    kept = values["train/loss"].notna()
    assert set(lines["run_name"]) == {run.name}
    return dict(zip(values.loc[kept, "train/global_step"].astype(int), values.loc[kept, "train/loss"]))


@pytest.mark.parametrize("program, points_of", [("tensorboard", points_of_tensorboard), ("trackio", points_of_trackio)])
def test_a_program_draws_the_history_without_a_network(program, points_of, toy, tmp_path, monkeypatch):
    if not find_spec(program):  # importing trackio would fix its folder
        pytest.skip(f"{program} is not installed")
    for name in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    run, folder = make_run(batch_rows=16, **toy["run"]), tmp_path / "outputs" / "runs" / "mine"
    fitted = fit(run, toy["pairs"], toy["rows"], folder, Strategies([]), report_to=program)
    drawn = points_of(tmp_path / "outputs" / "logs" / program, folder)
    assert drawn == pytest.approx({line["step"]: line["loss"] for line in fitted.history}, rel=1e-3) and len(drawn) > 5
    assert not [path for path in folder.rglob("*") if "events" in path.name or path.suffix == ".db"]


def test_a_program_that_nobody_knows_is_one_sentence(toy, tmp_path):
    with pytest.raises(InputError, match="report_to cannot be 'paper'; choose from none, "):
        fit(make_run(**toy["run"]), toy["pairs"], toy["rows"], tmp_path, Strategies([]), report_to="paper")


def test_a_look_changes_nothing_that_is_learned(toy, tmp_path):
    run, held = make_run(batch_rows=16, **toy["run"]), np.arange(256, 300)
    lists = Lists("ndcg", 0.25, held, np.arange(44) // 11, np.eye(len(LABELS))[0][np.arange(44) % 4])
    plain = fit(run, toy["pairs"], toy["rows"], tmp_path / "plain", Strategies([]))
    looked = fit(run, toy["pairs"], toy["rows"], tmp_path / "looked", Strategies([]), [lists])
    assert pd.DataFrame(looked.history)["ndcg"].notna().sum() == 4 and "ndcg" not in pd.DataFrame(plain.history)
    assert all(value.equal(plain.model.state_dict()[name]) for name, value in looked.model.state_dict().items())
