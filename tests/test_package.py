"""What is packed is what was trained: a packed ensemble ranks fresh files as the ensemble did; anything broken is refused."""
import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

from esci_nb.cli import main
from esci_nb.contract import LABELS, LOCALES, PROB_COLUMNS, InputError
from esci_nb.rank.submission import find_files, read_candidates
from esci_nb.run.stages import combine
from esci_nb.ship.inference import rank_lists
from esci_nb.ship.package import MANIFEST, describe_run, open_package


@pytest.fixture(scope="module")
def packed(made, tmp_path_factory):
    "The demo's ensemble, packed by the command."
    folder = tmp_path_factory.mktemp("packed") / "package"
    assert main(["pack", str(made.ensemble), "--to", str(folder)]) == 0
    return folder


def ranked_again(ensemble, package, files, tmp_path):
    "The ranking by the package, after a comparison of its probabilities and its file with those of the ensemble."
    ranking = rank_lists(open_package(package), read_candidates(files.lists), files.catalogues, tmp_path / "submission.csv", 3600)
    trained = pd.read_parquet(ensemble / "test.parquet").set_index("example_id")
    fresh = ranking.rows.set_index("example_id").loc[trained.index]
    assert np.allclose(fresh[list(PROB_COLUMNS)], trained[list(PROB_COLUMNS)], atol=1e-5)
    assert set(ranking.outcomes["state"]) == {"used"}
    assert (tmp_path / "submission.csv").read_bytes() == (ensemble / "submission.csv").read_bytes()
    return ranking


def test_a_packed_ensemble_ranks_as_the_ensemble_did(made, packed, tiny_files, tmp_path):
    assert len(ranked_again(made.ensemble, packed, find_files(tiny_files), tmp_path).outcomes) == len(made.runs)


def test_packed_stacking_ranks_as_the_ensemble_did(made, tiny_files, tmp_path):
    stacked = combine(made.runs, made.data, "stacking", outputs=made.data.parent.parent)
    assert main(["pack", str(stacked), "--to", str(tmp_path / "package")]) == 0
    ranked_again(stacked, tmp_path / "package", find_files(tiny_files), tmp_path)


def test_bm25_among_the_members_is_computed_again(made, tiny_files, tmp_path):
    with_words = combine(made.runs, made.data, scores={"words": "bm25"}, outputs=made.data.parent.parent)
    assert main(["pack", str(with_words), "--to", str(tmp_path / "package")]) == 0
    files, said, away = find_files(tiny_files), [], {}
    for package in (open_package(tmp_path / "package"), dataclasses.replace(open_package(tmp_path / "package"), left_out=("words",))):
        ranking = rank_lists(package, read_candidates(files.lists), files.catalogues, tmp_path / "s.csv", 3600, say=said.append)
        trained = pd.read_parquet(with_words / "test.parquet").set_index("example_id")[list(PROB_COLUMNS)]
        fresh = ranking.rows.set_index("example_id").loc[trained.index, list(PROB_COLUMNS)]
        away[package.left_out] = np.abs(fresh - trained).to_numpy().mean()
    assert not any("cannot be used" in line for line in said)
    assert away[()] < 0.01 < away["words",], "not quite the same: its word counts are those of the lists to rank"


def test_the_wheel_holds_the_library_and_nothing_else(packed):
    wheel, = packed.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"esci_nb", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert "esci_nb/ship/inference.py" in zipfile.ZipFile(wheel).namelist()


def test_scores_of_all_folds_stand_in_the_manifest(made, packed):
    models = json.loads((packed / MANIFEST).read_text())["models"]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in made.runs]
    over_all = sum(one["oof_ndcg"] * one["oof_lists"] for one in metrics) / sum(one["oof_lists"] for one in metrics)
    assert {round(model["cv"], 9) for model in models} == {round(over_all, 9)}
    assert all(sum(model["shares"][locale] for model in models) == pytest.approx(1) for locale in LOCALES)


@pytest.mark.parametrize("broken, part", [
    (lambda folder: next(folder.glob("models/*/model.safetensors")).write_bytes(b"short"), "is broken: its sha256"),
    (lambda folder: next(folder.glob("models/*/tokenizer.json")).unlink(), "is missing"),
    (lambda folder: (folder / "method.json").write_text("{}"), "method.json is broken"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read as JSON"),
    (lambda folder: (folder / MANIFEST).write_text('{"format": 99, "models": [1]}'), "format 99"),
])
def test_a_broken_package_is_refused_in_one_sentence(packed, tmp_path, broken, part):
    copy = tmp_path / "package"
    shutil.copytree(packed, copy)
    broken(copy)
    with pytest.raises(InputError, match=part) as caught:
        open_package(copy)
    assert "\n" not in str(caught.value)


def test_a_model_of_other_classes_is_refused(made, packed, tmp_path):
    copy, run = tmp_path / "package", tmp_path / "run"
    shutil.copytree(packed, copy)
    shutil.copytree(made.runs[0], run)
    for head in (run / "model" / "head.json", next(copy.glob("models/*/head.json"))):
        head.write_text(json.dumps(json.loads(head.read_text()) | {"labels": LABELS[::-1]}))
    for call in (lambda: open_package(copy, verify=False), lambda: describe_run(run, dict.fromkeys(LOCALES, 1.0))):
        with pytest.raises(InputError, match=f"classes {', '.join(LABELS[::-1])} where {', '.join(LABELS)} are needed"):
            call()


def test_what_cannot_be_packed_is_refused_and_nothing_is_written(made, packed, tmp_path, capsys):
    for words, part in (([str(tmp_path), "--to", str(tmp_path / "a")], "is no finished run"),
                        ([str(made.runs[0]), "--to", str(packed)], "is not an empty folder"),
                        ([str(made.ensemble), str(made.runs[0]), "--to", str(tmp_path / "a")], "is an ensemble and 1 more")):
        assert main(["pack", *words]) == 2
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1 and not (tmp_path / "a").exists()


def test_the_package_chapter_waits_for_torch():
    code = "import sys, esci_nb.ship.package; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
