"""Odd data sets: `check` and the stages preprocess and eda take each, or refuse it in one sentence; nothing else happens.

A few in every run; all, and the demo over a good share of them, with FAULTS=1."""
import contextlib
import io
import json
import os
import warnings
from pathlib import Path

import pytest

from conftest import QUICK, ROOT
from esci_nb.cli import main
from esci_nb.contract import InputError
from odd_data import CASES

FAULTS = bool(os.environ.get("FAULTS"))
FEW = ["query_id limits", "query_id booleans", "product_id return", "product_title not UTF-8 in categories", "product_brand all missing", "everything optional missing",
       "lists of bullets", "flags as booleans", "title of closings", "brand of formulas", "only test rows", "one train query", "no ranked lists", "only E", "utf_16",
       "beside ._train-v0.3.csv", "file with a page of noise", "a_folder_for_a_file", "column twice", "no products", "sources_that_contradict"]


def run_cells(stage: str, **parameters) -> None:
    "The code of a pipeline notebook in this process, which takes a second where a kernel takes ten; figures are drawn."
    import matplotlib.pyplot as plt
    cells = [cell for cell in json.loads((ROOT / f"nbs/pipeline/{stage}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    names = {"display": lambda *things: [getattr(thing, "_repr_html_", str)() for thing in things]}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{stage}, code cell {number}", "exec"), names)
        names.update(parameters if number == 0 else {})
        for figure in map(plt.figure, plt.get_fignums()):
            figure.savefig(io.BytesIO(), format="png", dpi=20)
        plt.close("all")


def outcome(call, *arguments, **values) -> str:
    "'' for success, else what is refused in one sentence."
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(*arguments, **values)
        except InputError as error:
            assert "\n" not in str(error) and 30 < len(str(error)) < 1000, str(error)
            return str(error)
    return ""


@pytest.mark.parametrize("name", CASES if FAULTS else FEW)
def test_odd_data_is_taken_or_refused_in_one_sentence(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ESCI_NB_RUNNER", "1")
    monkeypatch.chdir(tmp_path)
    folder = CASES[name](tmp_path / "data")
    code = main(["check", str(folder)])
    said = capsys.readouterr().err.strip().split("\n")[-1]
    refused = outcome(run_cells, "preprocess", source=str(folder), outputs="outputs")
    assert code == (2 if refused else 0) and (not refused or said == f"esci-nb: {refused}"), (code, said, refused)
    assert bool(refused) != any(Path("outputs").rglob("data.json")) and not (refused and any(Path("outputs").rglob("*")))
    explored = outcome(run_cells, "eda", source=str(folder), outputs="outputs")
    assert not refused or explored or "product_title, is empty" in refused, "what is refused once is refused everywhere, but one may look at blank titles"


@pytest.mark.skipif(not FAULTS, reason="minutes for each; set FAULTS=1")
@pytest.mark.parametrize("name", list(CASES)[::6])
def test_a_demo_over_odd_data_ends_well_or_in_one_sentence(name, tmp_path, monkeypatch):
    from esci_nb.run.demo import run_everything
    monkeypatch.chdir(tmp_path)
    folder = CASES[name](tmp_path / "data")
    refused = outcome(run_everything, str(folder), n_folds=2, outputs=tmp_path / "outputs", **QUICK)
    assert not list((tmp_path / "outputs").rglob("failed.ipynb"))
    assert not refused or not list((tmp_path / "outputs").rglob("checkpoint-*"))
