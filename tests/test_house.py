"""The house is in order: floors, chapters, library in sync with the notebooks, README current, imports light."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from readme import readme_text

BIN = Path(sys.executable).parent
LIBRARY = sorted(path for path in (ROOT / "esci_nb").rglob("*.py") if path.stem not in ("__init__", "_modidx"))
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
PIPELINE = sorted((ROOT / "nbs" / "pipeline").glob("*.ipynb"))
IMPORT = re.compile(r"\bfrom esci_nb(?:\.([\w.]+))? import (\([^)]*\)|[^\n;]+)|\bimport esci_nb\.([\w.]+)")


def name_of(path: Path) -> str:
    "A module or a notebook in words, as an id of a test."
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])


def code_cells(path: Path) -> list[str]:
    "The sources of a notebook's code cells."
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def module_of(path: Path) -> str:
    "The module that a chapter exports, '' for none."
    names = re.findall(r"^#\| default_exp ([\w.]+)", "\n".join(code_cells(path)), re.M)
    return names[0] if names else ""


MODULES = {module_of(path): path for path in CHAPTERS if module_of(path)}


def imports(source: str) -> set[str]:
    "The modules of the library that a piece of code imports, anywhere in it, a string for another process included."
    modules = set()
    for module, names, plain in IMPORT.findall(source):
        members = re.findall(r"(\w+)(?: as \w+)?", names)
        modules |= {name for name in (module, plain, *(f"{module}.{member}".strip(".") for member in members)) if name in MODULES}
    return modules


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


# Floors and chapters

def test_no_floor_uses_a_higher_one():
    done = subprocess.run([sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()",
                           "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_no_chapter_needs_a_later_one(path):
    later = {module for source in code_cells(path) for module in imports(source) if MODULES[module].name > path.name}
    assert not later, f"{path.name} imports {', '.join(f'{module} ({MODULES[module].name})' for module in sorted(later))}"


def test_every_module_is_a_chapter_and_no_number_is_taken_twice():
    assert {name_of(path) for path in LIBRARY} == set(MODULES) - {"__init__"}
    numbers = [path.name[:3] for path in CHAPTERS]
    assert len(set(numbers)) == len(numbers) and all(number.isdigit() for number in numbers)


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_exported_cells_are_small(path):
    exported = [source for source in code_cells(path) if re.match(r"#\| export\b", source)]
    lengths = {source.split("\n")[1][:60]: sum(bool(line.strip()) for line in source.split("\n")) for source in exported}
    assert max(lengths.values(), default=0) <= 60, {start: length for start, length in lengths.items() if length > 60}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_no_warning_is_stored(path):
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = ["".join(text) for output in outputs for text in (output.get("text", ""), output.get("data", {}).get("text/plain", ""))]
    assert not [text[:200] for text in texts if re.search(r"\w+Warning\b", text)]


@pytest.mark.parametrize("path", [*LIBRARY, *NOTEBOOKS], ids=name_of)
def test_private_names_stay_at_home(path):
    own = name_of(path) if path.suffix == ".py" else module_of(path)
    for source in [path.read_text()] if path.suffix == ".py" else code_cells(path):
        tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
        taken = {name.asname or name.name: node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                 and (node.level or (node.module or "").startswith("esci_nb")) for name in node.names}
        private = {name for name in taken if re.match(r"_[^_]", name) and taken[name].removeprefix("esci_nb.") != own}
        private |= {f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                    and re.match(r"_[^_]", node.attr) and f"{taken.get(node.value.id, '')}.{node.value.id}".removeprefix("esci_nb.") in MODULES}
        assert not private


# Notebooks and library

def test_export_in_sync(copy):
    def library() -> dict[str, str]:
        return {path.relative_to(copy).as_posix(): path.read_text() for path in (copy / "esci_nb").rglob("*.py")}
    before = library()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
    assert before == library(), "run nbdev_export and commit the library"


def test_notebooks_clean(copy):
    before = {path: path.read_text() for path in (copy / "nbs").rglob("*.ipynb")}
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    dirty = [path.name for path, text in before.items() if path.read_text() != text]
    assert before and not dirty, f"run nbdev_clean: {dirty}"


def test_lint():
    done = subprocess.run([BIN / "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise", "nbs", "tests"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_needs_no_development_packages(path):
    tree = ast.parse(path.read_text())
    packages = {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    packages |= {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not packages & {"nbdev", "fastcore", "execnb", "ir_measures", "pytest", "importlinter"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_public_definitions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_import_waits_for_torch():
    modules = "contract, files, metrics, settings, recipe, identity, folders, data.load, data.prepare, run.stages, cli".split(", ")
    code = f"import sys, esci_nb; {'; '.join(f'import esci_nb.{module}' for module in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_weights_are_never_pickles():
    for path in LIBRARY:
        text = path.read_text()
        assert "torch.load" not in text and "pickle" not in text.replace("a pickle may run code", ""), path.name
        assert "trust_remote_code=True" not in text, path.name
