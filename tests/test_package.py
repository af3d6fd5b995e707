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
from conftest import ROOT

from esci_nb.cli import main
from esci_nb.contract import LABELS, LOCALES, PROB_COLUMNS, InputError
from esci_nb.folders import read_run
from esci_nb.hub import load_tokenizer
from esci_nb.rank.submission import check_submission, read_candidates
from esci_nb.rank.tasks import TASKS
from esci_nb.run.plan import EnsembleTable, read_grid
from esci_nb.run.stages import combine
from esci_nb.ship.first import find_attached
from esci_nb.ship.inference import rank_lists
from esci_nb.ship.package import KAGGLE_FILES, MANIFEST, describe_run, open_package, write_kaggle
from esci_nb.ship.ranker import Ranker
from esci_nb.ship.wheels import PACKED, PYTHONS, pythons_of


@pytest.fixture(scope="module")
def packed(made, tmp_path_factory):
    "The demo's ensemble, packed by the command."
    folder = tmp_path_factory.mktemp("packed") / "package"
    assert main(["pack", str(made.ensemble), "--to", str(folder)]) == 0
    return folder


def ranked_again(ensemble, package, files, tmp_path):
    "The ranking by the package, after a comparison of its probabilities and its file with those of the ensemble."
    ranking = rank_lists(open_package(package), read_candidates(files[0]), files[1], tmp_path / "submission.csv", 3600)
    trained = pd.read_parquet(ensemble / "test.parquet").set_index("example_id")
    fresh = ranking.rows.set_index("example_id").loc[trained.index]
    assert np.allclose(fresh[list(PROB_COLUMNS)], trained[list(PROB_COLUMNS)], atol=1e-5)
    assert set(ranking.outcomes["state"]) == {"used"}
    assert (tmp_path / "submission.csv").read_bytes() == (ensemble / "submission.csv").read_bytes()
    return ranking


def test_a_packed_ensemble_ranks_as_the_ensemble_did(made, packed, tiny_files, tmp_path):
    assert len(ranked_again(made.ensemble, packed, find_attached(tiny_files), tmp_path).outcomes) == len(made.runs)


def test_packed_stacking_ranks_as_the_ensemble_did(made, tiny_files, tmp_path):
    stacked = combine(made.runs, made.data, "stacking", outputs=made.data.parent.parent)
    assert main(["pack", str(stacked), "--to", str(tmp_path / "package")]) == 0
    ranked_again(stacked, tmp_path / "package", find_attached(tiny_files), tmp_path)


def test_www_plus_is_packed_and_submitted_like_any_ensemble(made, tiny_files, tmp_path):
    """As its grid file says, from the demo's runs, BM25 and, in the place of untrained encoders, the small one: a method that is chosen, the files of three
    tasks, the same ranking from the package."""
    table = EnsembleTable(**read_grid(ROOT / "nbs" / "grids" / "www_plus.toml").ensemble[-1])
    scores = {name: scorer if scorer == "bm25" else read_run(made.runs[0]).backbone for name, scorer in table.scores.items()}
    plus = combine(made.runs, made.data, table.method, table.name, scores, outputs=made.data.parent.parent)
    methods = pd.read_csv(plus / "methods.csv").set_index("method")
    assert table.method in methods.index and methods.loc[table.method, "ndcg"] < methods.loc[table.method, "optimised"] + 0.05
    assert main(["pack", str(plus), "--to", str(tmp_path / "package")]) == 0
    files, test = find_attached(tiny_files), pd.read_parquet(plus / "test.parquet")
    ranking = rank_lists(open_package(tmp_path / "package"), read_candidates(files[0]), files[1], tmp_path / "submission.csv", 3600)
    fresh = ranking.rows.set_index("example_id").loc[test["example_id"], list(PROB_COLUMNS)].to_numpy()
    assert set(ranking.outcomes["state"]) == {"used"}
    assert np.abs(fresh - test[list(PROB_COLUMNS)]).to_numpy().mean() < 0.01, "the word counts of BM25 are those of the lists to rank"
    assert check_submission(tmp_path / "submission.csv", test)["rows"] == len(test)
    for task in TASKS:
        assert main(["check", str(tiny_files), "--submission", str(plus / f"task{task.number}.csv")]) == 0
        said = pd.read_csv(plus / f"task{task.number}.csv")
        assert said["example_id"].tolist() == test["example_id"].tolist() and set(said[task.column]) <= set(task.classes)
    ranked = Ranker.load(plus).rank("red shoe", ["red running shoe", "lamp"])
    assert len(ranked) == 2 and np.isfinite(ranked["score"]).all()


def test_runs_that_read_in_different_languages_make_one_ensemble_and_one_package(tiny_files, tmp_path, capsys):
    file, outputs = tmp_path / "grid.toml", tmp_path / "outputs"
    file.write_text("""recipes = ["baseline", "gains"]
        data = {n_folds = 2, languages = ["us"]}
        recipe = {epochs = 1, precision = "fp32", max_length = 32, text_fields = ["title"], gains = {language = "us"}}
        backbone = [{name = "small"}]
        ensemble = [{name = "both"}]""")
    assert main(["grid", str(file), str(tiny_files), "--outputs", str(outputs), "--plan", "--set", "language=jp"]) == 2
    assert "does not hold its texts in the language of 'jp'; prepare it with the data setting languages=jp." in capsys.readouterr().err
    assert main(["grid", str(file), str(tiny_files), "--outputs", str(outputs)]) == 0
    ensemble, = outputs.glob("ensembles/both-*")
    assert main(["pack", str(ensemble), "--to", str(tmp_path / "package")]) == 0
    texts = {model.recipe.language: model.texts for model in open_package(tmp_path / "package").models}
    assert set(texts) == {"", "us"} and texts["us"]["translator"] == "glossary"
    ranked_again(ensemble, tmp_path / "package", find_attached(tiny_files), tmp_path)
    test = pd.read_parquet(ensemble / "test.parquet")
    for run in outputs.glob("runs/gains-*"):
        assert set(pd.read_parquet(run / "test.parquet")["example_id"]) == set(test["example_id"]), "it ranks the lists of all locales"
    assert main(["export", str(run), "--to", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "translate yours into en" in card and "language: [en]" in card


def test_bm25_among_the_members_is_computed_again(made, tiny_files, tmp_path):
    with_words = combine(made.runs, made.data, scores={"words": "bm25"}, outputs=made.data.parent.parent)
    assert main(["pack", str(with_words), "--to", str(tmp_path / "package")]) == 0
    files, said, away = find_attached(tiny_files), [], {}
    for package in (open_package(tmp_path / "package"), dataclasses.replace(open_package(tmp_path / "package"), scorers={})):
        ranking = rank_lists(package, read_candidates(files[0]), files[1], tmp_path / "s.csv", 3600, say=said.append)
        trained = pd.read_parquet(with_words / "test.parquet").set_index("example_id")[list(PROB_COLUMNS)]
        fresh = ranking.rows.set_index("example_id").loc[trained.index, list(PROB_COLUMNS)]
        away[tuple(package.scorers)] = np.abs(fresh - trained).to_numpy().mean()
    assert not any("cannot be used" in line for line in said)
    assert away["words",] < 0.01 < away[()], "not quite the same: its word counts are those of the lists to rank"


def test_an_untrained_encoder_among_the_members_is_packed_as_it_is(made, tiny_files, tmp_path):
    encoder, files, package, said = read_run(made.runs[0]).backbone, find_attached(tiny_files), tmp_path / "package", []
    both = combine(made.runs, made.data, scores={"untrained": encoder}, outputs=made.data.parent.parent)
    assert main(["pack", str(both), "--to", str(package)]) == 0
    ranking = rank_lists(open_package(package), read_candidates(files[0]), files[1], tmp_path / "s.csv", 3600, say=said.append)
    trained = pd.read_parquet(both / "test.parquet").set_index("example_id")[list(PROB_COLUMNS)]
    assert np.allclose(ranking.rows.set_index("example_id").loc[trained.index, list(PROB_COLUMNS)], trained, atol=1e-4)
    assert not any("cannot be used" in line for line in said)
    rankers = [Ranker.load(folder) for folder in (both, package)]
    by_folder, by_package = ([ranker.rank(query, ["red running shoe", "lamp", "shoe"])["score"] for query in ("red shoe", "lamp")] for ranker in rankers)
    assert np.allclose(by_folder, by_package, atol=1e-4)
    assert all(ranker._load_scorer.cache_info().misses == 1 for ranker in rankers), "the encoder is loaded once"
    weights, = package.glob("scorers/untrained/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="model.safetensors is broken"):
        open_package(package)
    assert open_package(package, say=said.append).scorers == {} and "is broken" in said[-1]


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
    (run / "DONE").write_text("")  # or the changed file would be refused as damaged
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


def spoil_weights(model, change):
    from safetensors.numpy import load_file, save_file
    save_file({name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}, model / "model.safetensors")


@pytest.mark.parametrize("spoil, part", [
    (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda model: (model / "tokenizer.json").write_text("{"), "tokenizer"),
    (lambda model: (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-64]), "bytes and not"),
    (lambda model: spoil_weights(model, lambda name, tensor: tensor * np.float32("nan")), "other bytes than were written"),
    (lambda model: spoil_weights(model, lambda name, tensor: tensor[:50] if "word_embeddings" in name else tensor), "bytes and not"),
    (lambda model: (model / "config.json").write_text("{}"), "bytes and not"),
    (lambda model: (model.parent / "DONE").unlink(), "is no finished run"),
])
def test_a_broken_run_is_refused_before_anything_is_copied(made, tmp_path, capsys, spoil, part):
    run = tmp_path / "runs" / made.runs[0].name
    shutil.copytree(made.runs[0], run)
    spoil(run / "model")
    assert main(["pack", str(made.runs[1]), str(run), "--to", str(tmp_path / "new" / "package")]) == 2
    said = capsys.readouterr().err
    assert part in said and said.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_two_runs_of_one_name_are_refused(made, tmp_path, capsys):
    shutil.copytree(made.runs[0], tmp_path / "runs" / made.runs[0].name)
    assert main(["pack", str(made.runs[0]), str(tmp_path / "runs" / made.runs[0].name), "--to", str(tmp_path / "package")]) == 2
    assert "have the same name" in capsys.readouterr().err and not (tmp_path / "package").exists()


def change_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("change", [
    lambda manifest: manifest["models"][0].update(folder="../elsewhere"),
    lambda manifest: manifest["models"][0].update(folder="/etc"),
    lambda manifest: manifest["models"][0]["files"].update({"../../x": "0"}),
    lambda manifest: manifest["method"].update({"../method.json": "0"}),
    lambda manifest: manifest["wheels"].update({"/tmp/x-1-py3-none-any.whl": "0"}),
])
def test_paths_of_a_manifest_stay_inside(packed, tmp_path, change):
    copy = tmp_path / "package"
    shutil.copytree(packed, copy)
    change_manifest(copy, change)
    with pytest.raises(InputError, match="is not inside the folder"):
        open_package(copy)


def test_kaggle_reads_who_uploads_what(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    assert write_kaggle(tmp_path, "x" * 90, ["a/b"]) == "somebody"
    data, kernel = (json.loads((tmp_path / name).read_text()) for name in KAGGLE_FILES)
    assert kernel["dataset_sources"] == [data["id"]] and data["id"].startswith("somebody/") and "a/b" in data["description"]
    assert all(len(entry["title"]) <= 50 and len(entry["id"].split("/")[1]) <= 50 for entry in (data, kernel))
    assert kernel["enable_internet"] == "false" and kernel["code_file"] == "submission.ipynb"
    monkeypatch.delenv("KAGGLE_USERNAME")
    assert write_kaggle(tmp_path, "x", []) == "INSERT_USERNAME_HERE"


def test_the_manifest_covers_every_file(packed):
    manifest = json.loads((packed / MANIFEST).read_text())
    named = {*manifest["wheels"], *manifest["notebook"], *manifest["method"]} | {f"{model['folder']}/{name}" for model in manifest["models"]
                                                                                for name in model["files"]}
    assert named | {MANIFEST, *KAGGLE_FILES} == {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert set(manifest["needs"]) == {"python", "torch", "transformers", "pandas", "numpy"}


def test_what_is_broken_is_left_out_when_asked_for(packed, tmp_path):
    copy, said = tmp_path / "package", []
    shutil.copytree(packed, copy)
    broken = next(copy.glob("models/*"))
    (broken / "model.safetensors").write_bytes(b"short")
    (copy / "method.json").write_text("{}")
    (copy / "submission.ipynb").write_text("{}")
    package = open_package(copy, say=said.append)
    assert broken.name not in [model.name for model in package.models] and package.models and not package.has_method
    assert len(said) == 3 and all("is broken" in line for line in said)
    shutil.rmtree(copy / "models")
    with pytest.raises(InputError, match="no whole model"):
        open_package(copy, say=said.append)


def test_every_python_is_served(packed):
    wheels = [path.name for path in (packed / "wheels").iterdir()]
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in PACKED:
        assert any(running in pythons_of(wheel) for wheel in wheels if wheel.startswith(f"{name}-")), name
    if len(wheels) == 9:  # with network
        assert all(any(python in pythons_of(wheel) for wheel in wheels if wheel.startswith(f"{name}-")) for name in PACKED for python in PYTHONS)


def test_tokenizers_are_read_by_older_versions(packed, tmp_path):
    folder = next(packed.glob("models/*"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and not {"extra_special_tokens"} & set(config)
    shutil.copytree(folder, tmp_path / "old")  # as it was written before
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["[X]"]}))
    new, old = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "old"))
    texts = ["red shoe, 3 m", "\u9752\u3044\u30e9\u30f3\u30d7", "[SEP]"]
    assert new(texts)["input_ids"] == old(texts)["input_ids"] and new.model_input_names == old.model_input_names


def test_the_package_chapter_waits_for_torch():
    code = "import sys, esci_nb.ship.package; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
