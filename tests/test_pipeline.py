"""The whole way on a tiny sample through papermill: done, skipped, killed and resumed, failed."""
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import QUICK, ROOT

from esci_nb.cli import main
from esci_nb.folders import open_data
from esci_nb.run.demo import pipeline
from esci_nb.run.grid import grid
from esci_nb.run.stages import preprocess, run_stage, small_backbone
from esci_nb.contract import PROB_COLUMNS
from esci_nb.rank.submission import check_submission

LONGER = QUICK | {"epochs": 4}


def test_run_folders_keep_their_contract(made):
    for run in made.runs:
        names = {path.name for path in run.iterdir()}
        assert names == {"config.json", "metrics.json", "oof.parquet", "test.parquet", "model", "notebook.ipynb", "DONE"}
        assert {path.name for path in (run / "model").iterdir()} >= {"model.safetensors", "config.json", "head.json", "tokenizer.json"}
        for name in ("oof", "test"):
            table = pd.read_parquet(run / f"{name}.parquet")
            assert list(table) == ["example_id", "query_id", "product_id", "product_locale", *PROB_COLUMNS]
            assert np.allclose(table[list(PROB_COLUMNS)].sum(axis=1), 1, atol=1e-3)


def test_out_of_fold_rows_were_never_trained_on(made):
    data = open_data(made.data)
    seen = []
    for run in made.runs:
        fold = json.loads((run / "config.json").read_text())["recipe"]["fold"]
        predicted = set(pd.read_parquet(run / "oof.parquet")["query_id"])
        trained = set(data.rows.iloc[data.train(fold)]["query_id"])
        assert predicted and not predicted & trained
        seen += sorted(predicted)
    assert len(seen) == len(set(seen)) == data.rows.loc[data.rows["split"] == "train", "query_id"].nunique()


def test_submission_is_valid(made):
    data = open_data(made.data)
    assert check_submission(made.submission, data.rows.iloc[data.test])["rows"] == len(data.test)


def test_report_is_whole(made):
    html = made.report.read_text()
    assert html.count("data:image/png;base64") >= 4 or html.count("<img") >= 4
    assert {"ensemble", "BM25", "random"} <= set(made.scores["system"]) and set(made.scores["part"]) == {"oof", "test"}
    assert "InputError" not in html and "Traceback" not in html


def test_second_call_does_nothing(made, tiny_files):
    before = {path: path.stat().st_mtime_ns for path in made.data.parents[1].rglob("*") if path.is_file()}
    start = time.monotonic()
    again = pipeline(str(tiny_files), n_folds=2, outputs=made.data.parents[1], **QUICK)
    assert again.submission == made.submission and time.monotonic() - start < 20
    assert before == {path: path.stat().st_mtime_ns for path in made.data.parents[1].rglob("*") if path.is_file()}


def test_killed_run_is_finished_by_the_next_call(made):
    outputs = made.data.parents[1]
    code = (f"from pathlib import Path; from esci_nb.runs import grid; grid(Path({str(made.data)!r}), [{made.backbone!r}], "
            f"folds=[0], seeds=[7], outputs=Path({str(outputs)!r}), **{LONGER!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (found := list(outputs.glob("runs/*-s7-*/config.json"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()
    run = found[0].parent
    assert not (run / "DONE").exists() and (run / "LOCK").exists()
    assert grid(made.data, [made.backbone], folds=[0], seeds=[7], outputs=outputs, **LONGER) == [run]
    assert (run / "DONE").exists() and (run / "oof.parquet").exists() and not list(run.glob(".*part"))


def test_failure_keeps_the_notebook_and_is_no_user_error(made, tmp_path):
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "config.json").write_text(json.dumps({"runs": list(map(str, made.runs))}))
    (tmp_path / "ensemble" / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(RuntimeError, match="failed.ipynb"):
        run_stage("report", tmp_path / "out", {"ensemble": str(tmp_path / "ensemble"), "data": str(made.data)}, live=False)
    assert (tmp_path / "out" / "failed.ipynb").is_file() and not (tmp_path / "out" / "DONE").exists()


def test_all_rows_run_has_no_out_of_fold(made):
    outputs = made.data.parents[1]
    run, = grid(made.data, [made.backbone], folds=[-1], outputs=outputs, **QUICK)
    assert (run / "test.parquet").is_file() and not (run / "oof.parquet").exists()


def test_commands_print_tables(made, tiny_files, capsys):
    assert main(["check", str(tiny_files)]) == 0 and "judgements" in capsys.readouterr().out
    assert main(["check-submission", str(made.submission), str(tiny_files)]) == 0
    outputs = made.data.parents[1]
    words = ["demo", "--data", str(tiny_files), "--folds", "2", "--outputs", str(outputs)]
    assert main([*words, "--set", "epochs=1", "precision=fp32", "max_length=32", "text_fields=title"]) == 0
    said = capsys.readouterr().out
    assert "over BM25" in said and "submission.csv" in said and "report.html" in said


def test_competition_files_without_test_labels(tiny_files, tmp_path):
    examples = pd.read_parquet(tiny_files / "shopping_queries_dataset_examples.parquet")
    products = pd.read_parquet(tiny_files / "shopping_queries_dataset_products.parquet")
    names = {"E": "exact", "S": "substitute", "C": "complement", "I": "irrelevant"}
    lists = examples[examples["small_version"] == 1].rename(columns={"product_locale": "query_locale"})
    lists = lists.assign(esci_label=lists["esci_label"].map(names))
    columns = ["query_id", "query", "query_locale", "product_id"]
    folder = tmp_path / "v0.3"
    folder.mkdir()
    lists[lists["split"] == "train"][[*columns, "esci_label"]].to_csv(folder / "train-v0.3.csv.zip", index=False)
    lists[lists["split"] == "test"][columns].to_csv(folder / "test_public-v0.3.csv.zip", index=False)
    products.rename(columns={"product_color": "product_color_name"}).to_csv(folder / "product_catalogue-v0.3.csv.zip", index=False)
    made = pipeline(str(folder), n_folds=2, outputs=tmp_path / "outputs", **QUICK)
    assert set(made.scores["part"]) == {"oof"}
    wanted = examples[(examples["small_version"] == 1) & (examples["split"] == "test")]
    assert check_submission(made.submission, wanted)["rows"] == len(wanted)


def test_ladder_beside_a_peer(made, tiny_files, tmp_path):
    outputs = made.data.parents[1]
    data = preprocess(str(tiny_files), over="ranked", n_folds=2, outputs=outputs)
    rows = open_data(data).rows
    rows = rows[rows["source"] == "task1"][["query_id", "product_locale", "product_id"]]
    for seed in (0, 1):
        rows.assign(score=np.random.default_rng(seed).random(len(rows))).to_csv(tmp_path / f"{seed}.csv", index=False)
    backbone = small_backbone(data, outputs=outputs)
    words = ["ladder", str(tiny_files), "--backbones", str(backbone), "--seeds", "42", "--peers", f"shuffled={tmp_path / '[01].csv'}",
             "--n-folds", "2", "--variants", "clean=false", "--to", str(tmp_path / "ladder.csv"), "--outputs", str(outputs),
             "--set", "epochs=1", "precision=fp32", "max_length=32", "text_fields=title"]
    assert main(words) == 0
    table = pd.read_csv(tmp_path / "ladder.csv")
    assert {"baseline", "baseline clean=false", "shuffled", "BM25", "random"} == set(table["recipe"]) and (table["lists"] == table["lists"].iloc[0]).all()
    assert table.set_index("recipe").loc["baseline clean=false", "settings"] == "clean=false"
    assert table.set_index("recipe").loc["shuffled", "seeds"] == "0 1" and table["sd_over_seeds"].notna().sum() == 1
    assert "--variants clean=false --peers NAME=FILE" in table["command"].iloc[0] and "--zero-shot" not in table["command"].iloc[0]
