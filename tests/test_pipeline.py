"""Everything on a tiny sample through papermill: done, skipped, killed and resumed, failed."""
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import QUICK, ROOT, written

from esci_nb.cli import main
from esci_nb.contract import LABEL_RECORDS, PROB_COLUMNS, InputError
from esci_nb.folders import open_data, read_run
from esci_nb.rank.submission import check_submission
from esci_nb.recipe import make_run
from esci_nb.run.demo import run_everything
from esci_nb.run.stages import preprocess, run_stage, small_backbone, train_job

LONGER = QUICK | {"epochs": 4}


def demo_run(made, **changes):
    "A run of the demo with other coordinates or recipe fields, as a job."
    return train_job(make_run(data=made.data.name, backbone=made.backbone, **QUICK | changes), made.data.parents[1])


def test_run_folders_keep_their_contract(made):
    for run in made.runs:
        names = {path.name for path in run.iterdir()}
        assert names == {"config.json", "metrics.json", "history.csv", "oof.parquet", "test.parquet", "model", "notebook.ipynb", "DONE"}
        assert {path.name for path in (run / "model").iterdir()} >= {"model.safetensors", "config.json", "head.json", "tokenizer.json"}
        for name in ("oof", "test"):
            table = pd.read_parquet(run / f"{name}.parquet")
            assert list(table) == ["example_id", "query_id", "product_id", "product_locale", *PROB_COLUMNS]
            assert np.allclose(table[list(PROB_COLUMNS)].sum(axis=1), 1, atol=1e-3)


def test_out_of_fold_rows_were_never_trained_on(made):
    data = open_data(made.data)
    seen = []
    for run in made.runs:
        fold = read_run(run).fold
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
    before = written(made.data.parents[1])
    start = time.monotonic()
    again = run_everything(str(tiny_files), n_folds=2, outputs=made.data.parents[1], **QUICK)
    assert again.submission == made.submission and time.monotonic() - start < 20
    assert before == written(made.data.parents[1])


def test_killed_run_is_finished_by_the_next_call(made):
    job = demo_run(made, seed=7, **LONGER)
    code = (f"from pathlib import Path; from esci_nb.recipe import make_run; from esci_nb.run.stages import train_job; "
            f"train_job(make_run(data={made.data.name!r}, backbone={made.backbone!r}, seed=7, **{LONGER!r}), "
            f"Path({str(made.data.parents[1])!r})).run()")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (job.folder / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()
    run = job.folder
    assert not (run / "DONE").exists() and (run / "LOCK").exists()
    assert job.run() == run
    assert (run / "DONE").exists() and (run / "oof.parquet").exists() and not list(run.glob(".*part"))


def test_failure_keeps_the_notebook_and_a_refusal_leaves_nothing(made, tmp_path):
    (tmp_path / "ensemble").mkdir()
    parameters = {"ensemble": str(tmp_path / "ensemble"), "data": str(made.data)}
    (tmp_path / "ensemble" / "config.json").write_text(json.dumps({"runs": list(map(str, made.runs))}))
    (tmp_path / "ensemble" / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="test.parquet is missing or broken"):
        run_stage("report", tmp_path / "out", parameters, live=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "ensemble" / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="failed.ipynb"):
        run_stage("report", tmp_path / "out", parameters, live=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"failed.ipynb"}


def test_all_rows_run_has_no_out_of_fold(made):
    run = demo_run(made, fold=-1).run()
    assert (run / "test.parquet").is_file() and not (run / "oof.parquet").exists()


def test_commands_print_tables(made, tiny_files, capsys):
    assert main(["check", str(tiny_files)]) == 0 and "judgements" in capsys.readouterr().out
    assert main(["check", str(tiny_files), "--submission", str(made.submission)]) == 0
    outputs = made.data.parents[1]
    words = ["demo", "--data", str(tiny_files), "--n-folds", "2", "--outputs", str(outputs)]
    assert main([*words, "--set", "epochs=1", "precision=fp32", "max_length=32", "text_fields=title"]) == 0
    out = capsys.readouterr().out
    assert "over BM25" in out and "submission.csv" in out and "report.html" in out


def test_template_of_a_new_experiment(made, tiny_files, tmp_path):
    import papermill
    outputs, template = made.data.parents[1], ROOT / "nbs" / "guides" / "new_experiment.ipynb"
    names = papermill.inspect_notebook(str(template))
    parameters = {"source": str(tiny_files), "both": QUICK, "change": {"label_smoothing": 0.1}, "experiments": str(tmp_path / "experiments.csv"),
                  "outputs": str(outputs)}
    assert set(parameters) <= set(names) and all(one["help"] for one in names.values()), "every parameter says what it is"
    papermill.execute_notebook(str(template), str(tmp_path / "done.ipynb"), parameters=parameters, progress_bar=False, cwd=str(tmp_path), kernel_name="python3")
    said = "".join(line for cell in json.loads((tmp_path / "done.ipynb").read_text())["cells"] for out in cell.get("outputs", []) for line in out.get("text", []))
    assert "out-of-fold lists, 1 seed(s)" in said and "Warning" not in said
    table = pd.read_csv(tmp_path / "experiments.csv")
    changed = table[table["what changed"].str.contains("label_smoothing=0.1")]
    assert len(changed) == 1 and changed["folds"].iat[0] == 2 and changed["cv"].between(0, 1).all() and len(table) > 1


def test_competition_files_without_test_labels(tiny_files, tmp_path):
    examples = pd.read_parquet(tiny_files / "shopping_queries_dataset_examples.parquet")
    products = pd.read_parquet(tiny_files / "shopping_queries_dataset_products.parquet")
    names = {label.code: label.name for label in LABEL_RECORDS}
    lists = examples[examples["small_version"] == 1].rename(columns={"product_locale": "query_locale"})
    lists = lists.assign(esci_label=lists["esci_label"].map(names))
    columns = ["query_id", "query", "query_locale", "product_id"]
    folder = tmp_path / "v0.3"
    folder.mkdir()
    lists[lists["split"] == "train"][[*columns, "esci_label"]].to_csv(folder / "train-v0.3.csv.zip", index=False)
    lists[lists["split"] == "test"][columns].to_csv(folder / "test_public-v0.3.csv.zip", index=False)
    products.rename(columns={"product_color": "product_color_name"}).to_csv(folder / "product_catalogue-v0.3.csv.zip", index=False)
    made = run_everything(str(folder), n_folds=2, outputs=tmp_path / "outputs", **QUICK)
    assert set(made.scores["part"]) == {"oof"}
    candidates = examples[(examples["small_version"] == 1) & (examples["split"] == "test")]
    assert check_submission(made.submission, candidates)["rows"] == len(candidates)


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
    before = written(outputs)
    assert main(words) == 0 and written(outputs) == before and pd.read_csv(tmp_path / "ladder.csv").equals(table)
    (tmp_path / "1.csv").write_text((tmp_path / "0.csv").read_text())
    assert main(words) == 0 and len(list(outputs.glob("report/ladder-*"))) == 2, "other scores are another ladder"
