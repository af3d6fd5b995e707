"""Every library notebook runs from top to bottom, with its asserts, inside this process: ARGS=--cov=esci_nb counts its lines."""
import io
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    from nbdev.test import test_nb
    monkeypatch.chdir(ROOT / "nbs")
    said = io.StringIO()
    with redirect_stdout(said):
        passed, _ = test_nb(path, do_print=True)
    assert passed, said.getvalue()[-3000:]
