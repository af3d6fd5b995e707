"The table of all runs, and what two models do differently."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esci_nb.cli import main
from esci_nb.contract import InputError
from esci_nb.files import folder_lock, write_json
from esci_nb.look.runs import differs, folds_of, models_table, run_state, runs_table, settings_differences
from esci_nb.recipe import make_run


def run_folder(outputs: Path, name: str = "baseline", fold: int = 0, ndcg: float | None = 0.8, lists: int = 10, **values) -> Path:
    "A run folder with config and metrics; finished."
    run = make_run(name, data="sample-1", backbone="models/bert", fold=fold, **values)
    folder = outputs / "runs" / f"{name}-f{fold}-{abs(hash(json.dumps(values)))}"
    write_json(run.values() | {"family": name + json.dumps(values), "n_folds": 3, "covers": ["us"]}, folder / "config.json")
    write_json({"oof_ndcg": ndcg, "oof_lists": lists, "train_seconds": 60.0}, folder / "metrics.json")
    (folder / "DONE").touch()
    return folder


def test_state(tmp_path):
    folder = run_folder(tmp_path)
    assert run_state(folder) == "done"
    (folder / "DONE").unlink()
    assert run_state(folder) == "stopped"
    (folder / "failed.ipynb").touch()
    assert run_state(folder) == "failed"
    with folder_lock(folder):
        assert run_state(folder) == "running"


def test_differs_names_fields_and_labels():
    assert differs(make_run("www_first")) == ""
    assert differs(make_run("fgm", epochs=5, text_fields="title,brand", soft_labels="soft-1")) == \
        "text_fields=product_title+product_brand, epochs=5, soft_labels"
    assert differs(make_run().replace(name="mine")) == "", "a name of one's own is compared with the defaults"


def test_a_score_of_no_list_is_missing(tmp_path):
    run_folder(tmp_path, fold=0, ndcg=0.9, lists=30)
    run_folder(tmp_path, fold=1, ndcg=0.6, lists=10)
    run_folder(tmp_path, fold=2, ndcg=None, lists=0)
    table = runs_table(tmp_path)
    assert table["ndcg"].isna().sum() == 1
    model, = models_table(table).to_dict("records")
    assert model["folds"] == 3 and model["lists"] == 40 and np.isclose(model["ndcg"], (0.9 * 30 + 0.6 * 10) / 40) and model["seconds"] == 180


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="There are no runs in"):
        runs_table(tmp_path)
    folder = run_folder(tmp_path)
    (folder / "DONE").unlink()
    with pytest.raises(InputError, match="no finished run or ensemble"):
        folds_of(folder)


def test_folds_of_the_same_labels_only(tmp_path):
    runs = [run_folder(tmp_path, fold=fold) for fold in range(3)]
    config = json.loads((runs[2] / "config.json").read_text())
    write_json(config | {"soft_labels": "other"}, runs[2] / "config.json")
    assert folds_of(runs[0]) == sorted(runs[:2])


def test_settings_differences(tmp_path):
    first, second = run_folder(tmp_path), run_folder(tmp_path, fold=1, lr=1e-4, pooling="cls")
    table = settings_differences(first, second)
    assert set(table["field"]) == {"fold", "lr", "pooling"}
    ensemble = tmp_path / "ensembles" / "mean-1"
    write_json({"method": "mean", "runs": ["a"]}, ensemble / "config.json")
    assert "method" in set(settings_differences(first, ensemble)["field"])
    assert isinstance(table, pd.DataFrame)


def test_a_run_is_trained_again_to_the_same_bits(made, capsys):
    run = made.runs[0]
    assert main(["rerun", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("equal to the last bit") == 2 and "versions, code, device and threads are the same" in said
    again = Path(said.strip().split("\n")[-1])
    assert again.name == run.name and again != run and (again / "DONE").is_file()
    assert main(["rerun", str(run)]) == 0, "nothing is trained a third time"
    assert main(["rerun", str(made.data)]) == 2 and "is no finished run" in capsys.readouterr().err
    (run.parent.parent / "data" / made.data.name).rename(made.data.with_name("away"))
    try:
        assert main(["rerun", str(run)]) == 2 and f"The run read data/{made.data.name}" in capsys.readouterr().err
    finally:
        made.data.with_name("away").rename(made.data)


def test_the_list_of_experiments_keeps_what_its_user_wrote(tmp_path, capsys):
    run_folder(tmp_path, ndcg=0.8)
    path = tmp_path / "experiments.csv"
    command = ["runs", "--outputs", str(tmp_path), "--experiments", str(path)]
    assert main(command) == 0
    mine = pd.read_csv(path, dtype=str, keep_default_na=False)
    mine.loc[0, ["leaderboard", "note"]] = ["0.790", "a start"]
    mine.assign(hours="2").to_csv(path, index=False)
    run_folder(tmp_path, fold=1, ndcg=0.9)
    run_folder(tmp_path, ndcg=0.7, lr=2e-4)
    assert main(command) == 0
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert table["cv"].tolist() == ["0.8500", "0.7000"] and table["hours"].tolist() == ["2", ""]
    assert table.loc[0, ["leaderboard", "note"]].tolist() == ["0.790", "a start"] and table["what changed"].iat[1] == "baseline, lr=0.0002"
    path.write_text("name;cv\n")
    assert main(command) == 2 and "no column id" in capsys.readouterr().err and path.read_text() == "name;cv\n"


def test_documentation_is_written_once(tmp_path, capsys):
    folder = run_folder(tmp_path / "outputs", ndcg=0.8123, lists=30)
    command = ["document", str(folder), "--to", str(tmp_path / "model.md")]
    assert main(command) == 0
    text = (tmp_path / "model.md").read_text()
    assert "NDCG 0.8123 over 30 out-of-fold lists" in text and all(f"## A{number}. " in text for number in range(1, 10)) and "## B. " in text
    assert main(command) == 2 and "there already" in capsys.readouterr().err
    assert main(["document", str(tmp_path), "--to", str(tmp_path / "other.md")]) == 2 and not (tmp_path / "other.md").exists()
