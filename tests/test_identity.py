"""An id follows from what was asked for and what was read: not from paths, not from source text; the same request twice does nothing."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import QUICK, ROOT, written

from esci_nb import identity
from esci_nb.cli import main
from esci_nb.contract import LABEL_RECORDS
from esci_nb.data.prepare import DataSettings
from esci_nb.folders import run_id, run_path
from esci_nb.measure.ladder import ladder_path
from esci_nb.model.small import SMALL_OVERRIDES
from esci_nb.recipe import make_run
from esci_nb.run.demo import run_everything
from esci_nb.run.stages import data_path, ensemble_path, write_report

QUICK_WORDS = [f"{name}={value}" for name, value in QUICK.items()]
PLAIN = DataSettings(n_folds=2)


def demo_run(made, backbone=None, **changes):
    "The run of the demo, on another backbone or with other values."
    return make_run(data=made.data.name, backbone=str(backbone or made.backbone), **SMALL_OVERRIDES | QUICK | changes)


# Backbones

def test_a_backbone_is_its_content_however_it_is_spelled(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.backbone, "elsewhere/copy")
    Path("link").symlink_to(made.backbone)
    spellings = [made.backbone, os.path.relpath(made.backbone), "link", "elsewhere/copy", "elsewhere/../elsewhere/copy/"]
    assert {run_id(demo_run(made, backbone)) for backbone in spellings} == {identity.id_of(made.runs[0])}
    assert {run_path(demo_run(made, backbone), made.data.parents[1]) for backbone in spellings} == {made.runs[0]}


def test_other_weights_are_another_backbone(made, tmp_path):
    shutil.copytree(made.backbone, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("words about it")
    (tmp_path / "copy" / "LOCK").touch()
    same = run_id(demo_run(made, tmp_path / "copy"))
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert run_id(demo_run(made, tmp_path / "copy")) != same == identity.id_of(made.runs[0])


def test_a_hub_backbone_is_its_revision(tmp_path, monkeypatch):
    cached = tmp_path / "models--some--model"
    for revision in ("1" * 40, "2" * 40):
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "snapshots" / revision / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ids = []
    for revision in ("1" * 40, "2" * 40, "1" * 40):
        (cached / "refs" / "main").write_text(revision)
        ids.append(run_id(make_run(backbone="some/model")))
    assert ids[0] == ids[2] != ids[1]


# What was asked for

def test_only_what_changes_the_run_changes_its_id(made):
    plain = demo_run(made)
    assert run_id(plain) == run_id(demo_run(made, epochs=1, dropout_branches=1)) == run_id(plain.replace(name="another name"))
    assert run_id(plain) == run_id(demo_run(made, text_fields=["product_title"]))
    others = [demo_run(made, **change) for change in ({"fold": 1}, {"seed": 7}, {"teacher": 0}, {"epochs": 2}, {"soft_labels": "soft-12345678"},
                                                      {"pseudo_labels": "pseudo-12345678"})]
    others += [plain.replace(data="files-12345678"), plain.replace(soft_labels="soft-87654321")]
    assert len({run_id(run) for run in (plain, *others)}) == len(others) + 1


def test_results_that_change_with_the_code_get_a_new_id(made, monkeypatch):
    before = run_id(demo_run(made))
    monkeypatch.setitem(identity.CODE_VERSIONS, "run", identity.CODE_VERSIONS["run"] + 1)
    assert run_id(demo_run(made)) != before


# What was read

def test_data_are_their_content_however_they_are_spelled(made, tiny_files, tmp_path, monkeypatch):
    shutil.copytree(tiny_files, tmp_path / tiny_files.name)
    for path in (tmp_path / tiny_files.name).iterdir():
        path.rename(path.with_name(path.name.upper()))
    monkeypatch.chdir(tmp_path)
    outputs = made.data.parents[1]
    assert {data_path(source, PLAIN, outputs) for source in (tiny_files, os.path.relpath(tiny_files), tiny_files.name)} == {made.data}
    assert data_path(tiny_files, PLAIN.replace(translated_weight=0.5), outputs) == made.data, "without translation it has no weight"
    assert data_path(tiny_files, PLAIN.replace(clean=False), outputs) != made.data


def test_capitals_in_a_file_name_hide_nothing(tiny_files, tmp_path):
    "A competition file that is called .CSV is read, and so it counts."
    examples = pd.read_parquet(tiny_files / "shopping_queries_dataset_examples.parquet").rename(columns={"product_locale": "query_locale"})
    examples["esci_label"] = examples["esci_label"].map({label.code: label.name for label in LABEL_RECORDS})
    products = pd.read_parquet(tiny_files / "shopping_queries_dataset_products.parquet")
    paths = []
    for number, suffix in enumerate((".csv", ".CSV", ".CSV")):
        folder = tmp_path / str(number) / "v0.3"
        folder.mkdir(parents=True)
        rows = examples[examples["split"] == "train"][["query_id", "query", "query_locale", "product_id", "esci_label"]]
        rows.iloc[number // 2:].to_csv(folder / f"train{suffix}", index=False)
        products.to_csv(folder / f"catalogue{suffix}", index=False)
        paths.append(data_path(folder, PLAIN, tmp_path))
    assert paths[0] == paths[1] != paths[2]


def test_other_scores_are_another_ensemble_and_another_ladder(made, tmp_path):
    outputs = made.data.parents[1]
    assert ensemble_path(made.runs, outputs=outputs) == ensemble_path(made.runs[::-1], outputs=outputs) == made.ensemble

    def paths(name: str, text: str) -> tuple[Path, Path]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return (ensemble_path(made.runs, scores={"mine": tmp_path / name}, outputs=outputs),
                ladder_path(made.runs, made.data, {"mine": [str(tmp_path / name)]}, outputs=outputs))
    one, moved, changed = paths("42.csv", "query_id,score\n1,2\n"), paths("moved/42.csv", "query_id,score\n1,2\n"), paths("42.csv", "query_id,score\n1,3\n")
    assert one == moved and not set(one) & set(changed) and one[0] != made.ensemble


# What does not count

def test_nothing_of_the_code_enters_an_id(made, tiny_files, tmp_path):
    "In a copy of the library whose every module was exported from another chapter and says more, all ids are the same."
    shutil.copytree(ROOT / "esci_nb", tmp_path / "esci_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for number, path in enumerate(sorted((tmp_path / "esci_nb").rglob("*.py"))):
        text = re.sub(r"nbs/\d+_[\w.]+\.ipynb", f"nbs/{number + 500}_renamed.ipynb", path.read_text())
        path.write_text(f"{text}\n# a word more\n")
    outputs = made.data.parents[1]
    code = f"""
import sys, esci_nb
from esci_nb.data.prepare import DataSettings
from esci_nb.folders import run_path
from esci_nb.recipe import make_run
from esci_nb.run.stages import data_path, eda_path, ensemble_path, errors_path, pseudo_label_job, small_backbone, soft_label_job
settings, runs, outputs = DataSettings(n_folds=2), {[str(run) for run in made.runs]!r}, {str(outputs)!r}
print(data_path("sample", settings, outputs), data_path({str(tiny_files)!r}, settings, outputs), small_backbone({str(made.data)!r}, outputs=outputs),
      run_path(make_run(data={made.data.name!r}, backbone={made.backbone!r}, **{SMALL_OVERRIDES | QUICK!r}), outputs),
      soft_label_job(runs, "data", outputs=outputs).folder, pseudo_label_job(runs, "data", outputs=outputs).folder,
      ensemble_path(runs, outputs=outputs), eda_path("sample", outputs=outputs), errors_path(runs, outputs=outputs))
print(esci_nb.__file__, file=sys.stderr)
"""
    answers = [subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
               for folder in (ROOT, tmp_path)]
    assert answers[0].stdout == answers[1].stdout and str(made.runs[0]) in answers[0].stdout, answers[1].stderr
    assert [answer.stderr.strip() for answer in answers] == [str(folder / "esci_nb" / "__init__.py") for folder in (ROOT, tmp_path)]


def test_moved_outputs_are_done(made, tiny_files, tmp_path, monkeypatch):
    outputs, away = made.data.parents[1], tmp_path / "somewhere" / "else"
    shutil.copytree(outputs, away)
    hidden = outputs.rename(outputs.with_name("hidden"))
    try:
        monkeypatch.chdir(tmp_path)
        before = written(away)
        moved = run_everything(str(tiny_files), n_folds=2, outputs=Path("somewhere/else"), **QUICK)
        assert before == written(away) and [run.name for run in moved.runs] == [run.name for run in made.runs]
        assert moved.ensemble.name == made.ensemble.name and moved.report.read_text() == (hidden / "report" / made.ensemble.name / "report.html").read_text()
        # what was made from other folders finds them where they are now
        shutil.rmtree(moved.report.parent)
        again = write_report(moved.ensemble, moved.data, away)
        assert pd.read_csv(again.parent / "scores.csv").equals(pd.read_csv(hidden / "report" / made.ensemble.name / "scores.csv"))
        assert main(["pack", str(moved.ensemble), "--to", "package"]) == 0 and len(list(Path("package/models").iterdir())) == len(made.runs)
    finally:
        hidden.rename(outputs)


# Twice

def commands(made, tiny_files) -> dict[str, list[str]]:
    "What the demo wrote, asked for again by each command that writes folders."
    outputs = str(made.data.parents[1])
    runs = [str(run) for run in made.runs]

    def stage(name: str, **values) -> list[str]:
        return ["run", name, "--set", *(f"{key}={value}" for key, value in (values | {"outputs": outputs}).items())]
    return {
        "demo": ["demo", "--data", str(tiny_files), "--n-folds", "2", "--outputs", outputs, "--set", *QUICK_WORDS],
        "grid": ["grid", str(tiny_files), "--backbones", "small", "--n-folds", "2", "--outputs", outputs, "--set", *QUICK_WORDS],
        "grid --plan": ["grid", str(tiny_files), "--backbones", "small", "--n-folds", "2", "--outputs", outputs, "--plan", "--set", *QUICK_WORDS],
        "ensemble": ["ensemble", *runs, "--outputs", outputs],
        "run preprocess": stage("preprocess", source=tiny_files, n_folds=2),
        "run train": stage("train", data=made.data, backbone=made.backbone,
                           overrides=json.dumps(SMALL_OVERRIDES | QUICK)),
        "run ensemble": stage("ensemble", runs=json.dumps(runs), data=made.data),
        "run report": stage("report", ensemble=made.ensemble, data=made.data),
    }


NAMES = ("demo", "grid", "grid --plan", "ensemble", "run preprocess", "run train", "run ensemble", "run report")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_done_is_not_done_again(name, made, tiny_files):
    before = written(made.data.parents[1])
    assert main(commands(made, tiny_files)[name]) == 0
    assert written(made.data.parents[1]) == before


def test_the_sample_is_not_written_twice(tmp_path):
    words = ["download", "sample", str(tmp_path / "files"), "--scale", "0.0006"]
    assert main(words) == 0
    before = written(tmp_path)
    assert main(words) == 0 and written(tmp_path) == before
    assert main([*words, "--seed", "1"]) == 0 and written(tmp_path) != before


def test_a_package_is_not_written_twice(made, tmp_path):
    words = ["pack", str(made.runs[0]), "--to", str(tmp_path / "package")]
    assert main(words) == 0
    before = written(tmp_path)
    assert main(words) == 0 and written(tmp_path) == before
    assert main(["pack", str(made.runs[1]), *words[2:]]) == 2 and written(tmp_path) == before, "of other runs it is refused"
