"""A user's mistake gives one clear sentence on stderr, exit code 2, and nothing half-written under outputs."""
import shutil
import zipfile

import pandas as pd
import pytest

from esci_nb.cli import main
from esci_nb.contract import EXAMPLES_FILE, LABELS, PRODUCTS_FILE, InputError


def edit(name, change):
    "A mistake: `change` applied to one of the two tables."
    def make(folder):
        table = pd.read_parquet(folder / name)
        table = change(table)
        table.to_parquet(folder / name)
    return make


def put(name, content):
    "A mistake: a file with this content."
    def make(folder):
        (folder / name).write_bytes(content)
    return make


def cut(name):
    "A mistake: a file of which the second half is missing."
    def make(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    return make


def remove(name):
    def make(folder):
        (folder / name).unlink()
    return make


def first(column, value):
    "A change: the first row of a column gets a value."
    def change(table):
        table[column] = table[column].astype(object)
        table.loc[table.index[0], column] = value
        return table
    return change


def broken_zip(folder):
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "train-v0.3.csv.zip").write_bytes(b"PK no zip")
    (folder / "product_catalogue-v0.3.csv").write_text("product_id,product_title,product_locale\n1,a,us\n")


def two_in_a_zip(folder):
    broken_zip(folder)
    with zipfile.ZipFile(folder / "train-v0.3.csv.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, "query_id,query,query_locale,product_id,esci_label\n1,a,us,1,exact\n")


EX, PR = EXAMPLES_FILE, PRODUCTS_FILE
DATA_MISTAKES = {
    "no products file": (remove(PR), "products"),
    "no examples file": (remove(EX), "examples"),
    "truncated examples": (cut(EX), EX),
    "truncated products": (cut(PR), PR),
    "text instead of parquet": (put(EX, b"query,product\n"), EX),
    "empty file": (put(PR, b""), PR),
    "missing column": (edit(EX, lambda t: t.drop(columns="esci_label")), "esci_label"),
    "missing product column": (edit(PR, lambda t: t.drop(columns="product_title")), "product_title"),
    "unknown locale": (edit(EX, first("product_locale", "atlantis")), "atlantis"),
    "unknown label": (edit(EX, first("esci_label", "X")), "X"),
    "unknown split": (edit(EX, first("split", "dev")), "dev"),
    "query id no number": (edit(EX, lambda t: t.assign(query_id=t["query_id"].map(lambda i: f"q{i}"))), "query_id"),
    "empty query": (edit(EX, lambda t: t.assign(query=t["query"].where(t["query_id"] != t["query_id"].iloc[0], " "))), "query"),
    "empty titles": (edit(PR, lambda t: t.assign(product_title="")), "product_title"),
    "duplicate example id": (edit(EX, lambda t: t.assign(example_id=[t["example_id"].iloc[1], *t["example_id"].iloc[1:]])), "example_id"),
    "pair with two labels": (edit(EX, lambda t: pd.concat([t, t.head(1).assign(
        example_id=10**7, esci_label=next(label for label in LABELS if label != t["esci_label"].iloc[0]))])), "twice"),
    "duplicate product": (edit(PR, lambda t: pd.concat([t, t.head(1).assign(product_title="another")])), "product"),
    "product not in the catalogue": (edit(EX, first("product_id", "NOSUCH")), "NOSUCH"),
    "one query id, two texts": (edit(EX, first("query", "quite another query")), "query"),
    "broken zip": (broken_zip, "zip"),
    "two tables in a zip": (two_in_a_zip, "zip"),
}


def refused(words, capsys, outputs, named):
    "Run a command that must refuse: exit code 2, one sentence that names the thing, nothing written."
    assert main([str(word) for word in words]) == 2
    sentence = capsys.readouterr().err.strip().split("\n")[-1]
    assert sentence.startswith("esci-nb: ") and named.lower() in sentence.lower() and "Traceback" not in sentence, sentence
    assert len(sentence) > 40 and sentence.count("\n") == 0
    assert not outputs.exists() or not any(outputs.iterdir()), sorted(outputs.rglob("*"))


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_data(mistake, tiny_files, tmp_path, capsys):
    folder = tmp_path / "files"
    shutil.copytree(tiny_files, folder)
    make, named = DATA_MISTAKES[mistake]
    make(folder)
    refused(["check", folder], capsys, tmp_path / "outputs", named)


@pytest.mark.parametrize("mistake", ["truncated products", "unknown label", "product not in the catalogue"])
def test_data_through_the_notebook(mistake, tiny_files, tmp_path, capsys):
    folder = tmp_path / "files"
    shutil.copytree(tiny_files, folder)
    make, named = DATA_MISTAKES[mistake]
    make(folder)
    refused(["demo", "--data", folder, "--outputs", tmp_path / "outputs"], capsys, tmp_path / "outputs", named)


WORDS = {
    "no such folder": (["demo", "--data", "/no/such/folder"], "/no/such/folder"),
    "unknown recipe": (["demo", "--recipe", "bsaeline"], "bsaeline"),
    "unknown recipe field": (["demo", "--set", "learning_rate=1"], "learning_rate"),
    "value of the wrong type": (["demo", "--set", "epochs=two"], "epochs"),
    "value out of range": (["demo", "--set", "head_dropout=2"], "head_dropout"),
    "unknown text field": (["demo", "--set", "text_fields=name"], "text_fields"),
    "unknown pooling": (["demo", "--set", "pooling=max"], "pooling"),
    "unknown precision": (["demo", "--set", "precision=int3"], "precision"),
    "a value twice": (["demo", "--set", "epochs=1", "epochs=2"], "epochs"),
    "no name=value": (["demo", "--set", "epochs"], "epochs"),
    "missing backbone folder": (["demo", "--backbone", "/no/such/model"], "/no/such/model"),
    "backbone not in the cache": (["demo", "--backbone", "nobody/no-such-model"], "nobody/no-such-model"),
    "unknown stage": (["run", "trian"], "trian"),
    "unknown notebook parameter": (["run", "train", "--set", "folds=1"], "folds"),
    "notebook parameter of the wrong type": (["run", "train", "--set", "fold=one"], "fold"),
    "data folder that is none": (["run", "train", "--set", "data=/tmp", "outputs=OUT"], "/tmp"),
    "runs that are none": (["run", "ensemble", "--set", 'runs=["/tmp"]', "data=/tmp", "outputs=OUT"], "/tmp"),
    "no runs": (["run", "ensemble"], "runs"),
    "grid with an unknown recipe": (["grid", "sample", "--backbones", "x", "--recipes", "fgmm"], "fgmm"),
    "sample of no size": (["download", "sample", "OUT/s", "--scale", "0"], "scale"),
    "submission that is not there": (["check", "sample", "--submission", "/no/such.csv"], "/no/such.csv"),
}


@pytest.mark.parametrize("mistake", WORDS)
def test_words(mistake, tmp_path, capsys):
    words, named = WORDS[mistake]
    words = [word.replace("OUT", str(tmp_path / "outputs")) for word in words]
    if words[0] in ("demo", "grid"):
        words += ["--outputs", str(tmp_path / "outputs")]
    refused(words, capsys, tmp_path / "outputs", named)


def test_too_little_disk_is_said_before_training(tmp_path, monkeypatch):
    import torch
    from esci_nb.train import room
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="disk"):
        room.check_room(1_001_000, tmp_path, torch.device("cpu"))


def test_too_little_memory_is_said_before_training(tmp_path, monkeypatch):
    import torch
    from types import SimpleNamespace
    from esci_nb.train import room
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InputError, match="memory"):
        room.check_room(1_001_000, tmp_path, torch.device("cpu"))


def test_peer_files_of_one_name(tmp_path):
    from esci_nb.measure.ladder import peer_files
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "42.csv").touch()
    assert peer_files(str(tmp_path / "a" / "*.csv")) == [str(tmp_path / "a" / "42.csv")] and peer_files("none.csv") == ["none.csv"]
    with pytest.raises(InputError, match="share a name"):
        peer_files(str(tmp_path / "*" / "42.csv"))


def test_a_peer_may_not_take_the_name_of_a_row_of_ours():
    from esci_nb.measure.ladder import measure_ladder
    for name in ("www", "BM25"):
        with pytest.raises(InputError, match=f"called '{name}'"):
            measure_ladder(None, "sample", "ladder.csv", "", {"mine": "mine.csv", name: "scores.csv"})
