"""The house is in order: library in sync with the notebooks, notebooks clean, README current, imports light."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from readme import readme_text

BIN = Path(sys.executable).parent
LIBRARY = sorted(path for path in (ROOT / "esci_nb").glob("*.py") if path.stem not in ("__init__", "_modidx"))
PIPELINE = sorted((ROOT / "nbs" / "pipeline").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the notebooks and the library, on which nbdev may work."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "esci_nb"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def test_export_in_sync(copy):
    before = {path.name: path.read_text() for path in (copy / "esci_nb").glob("*.py")}
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
    after = {path.name: path.read_text() for path in (copy / "esci_nb").glob("*.py")}
    assert before == after, "run nbdev_export and commit the library"


def test_notebooks_clean(copy):
    before = {path: path.read_text() for path in (copy / "nbs").rglob("*.ipynb")}
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    dirty = [path.name for path, text in before.items() if path.read_text() != text]
    assert before and not dirty, f"run nbdev_clean: {dirty}"


def test_lint():
    found = subprocess.run([BIN / "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise", "nbs", "tests"], cwd=ROOT,
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == readme_text(), "run make readme"


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.stem)
def test_pipeline_notebook_has_annotated_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    cell = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(cell) == 1
    for node in ast.parse("".join(cell[0]["source"])).body:
        assert isinstance(node, ast.AnnAssign), "every parameter has a type"
    assert all("#" in line for line in cell[0]["source"] if line.strip()), "every parameter says what it is"
    assert not any("#| export" in "".join(c["source"]) for c in cells), "the library is written in nbs/, not here"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_library_needs_no_development_packages(path):
    wanted = {(node.module or "").split(".")[0] for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
              and not node.level}
    wanted |= {name.name.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)
               for name in node.names}
    assert not wanted & {"nbdev", "fastcore", "execnb", "ir_measures", "pytest"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_public_definitions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_import_waits_for_torch():
    code = "import sys, esci_nb, esci_nb.data, esci_nb.metrics, esci_nb.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_weights_are_never_pickles():
    for path in LIBRARY:
        text = path.read_text()
        assert "torch.load" not in text and "pickle" not in text.replace("a pickle may run code", ""), path.name
        assert "trust_remote_code=True" not in text, path.name
