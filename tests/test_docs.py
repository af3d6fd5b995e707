"""Pages, guides and README say what is true: names, links, commands and figures; with the docs extra, the built site as well."""
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from esci_nb import docs
from esci_nb.cli import main, make_parser
from esci_nb.contract import InputError

NBS = ROOT / "nbs"
TEXTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((NBS / "guides").glob("*.md"))]
needs_sphinx = pytest.mark.skipif(not (find_spec("sphinx") and find_spec("myst_nb") and find_spec("furo")),
                                  reason="the extra docs is not installed: make check-docs runs this")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    "What Sphinx would read."
    folder = tmp_path_factory.mktemp("sources")
    docs.write_sources(NBS, folder)
    return folder


def test_every_notebook_and_guide_is_a_page(sources):
    wanted = [path.relative_to(NBS).with_suffix("") for path in (*NBS.rglob("*.ipynb"), *(NBS / "guides").glob("*.md"))
              if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)]
    missing = [str(page) for page in wanted if not any((sources / f"{page}{end}").is_file() for end in (".ipynb", ".md"))]
    assert len(wanted) > 30 and not missing, f"not in nbs/sidebar.yml: {missing}"


def test_every_page_says_how_to_run_it(sources):
    for path in (*sources.rglob("*.ipynb"), *sources.rglob("*.md")):
        text = path.read_text().lower()
        assert "run this page" in text or "how to run" in text or "make lab" in text or "nothing to run" in text, path.name


def test_every_public_name_is_a_target_once(sources):
    text = "".join(path.read_text() for path in sources.rglob("*.ipynb"))
    for path in (ROOT / "esci_nb").glob("*.py"):
        if path.stem in ("__init__", "_modidx"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                kind = "function" if isinstance(node, ast.FunctionDef) else "class"
                found = re.findall(rf"::::{{py:{kind}}} {node.name}(?:\((?:(?!\\n).)*)?\\n:module: esci_nb\.{path.stem}\\n", text)
                assert len(found) == 1, f"{path.stem}.{node.name}: {len(found)}"


def commands(text: str) -> list[list[str]]:
    "The words of each command in the sh blocks of a Markdown text, comments cut off."
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_commands_exist(path, capsys):
    from esci_nb.cli import parse_values
    from esci_nb.recipe import RECIPES, make_recipe
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    known = {"pip", "nbdev_export", "nbdev_clean", "ruff", "python", "papermill", "git", "cd", "unzip", "torchrun", "export"}
    for words in commands(path.read_text()):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        name = Path(words[0]).name if words else ""
        if name == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif name == "esci-nb":
            try:
                arguments = make_parser().parse_args(words[1:])
            except SystemExit:
                raise AssertionError(f"{' '.join(words)}: {capsys.readouterr().err}") from None
            for recipe in getattr(arguments, "recipes", None) or []:
                assert recipe in RECIPES or recipe == "rdrop", words  # rdrop: what the guide adds
            if arguments.command in ("grid", "demo", "ladder"):
                make_recipe(**parse_values(arguments.values))
        else:
            assert not words or name in known, words
        for word in words[1:]:
            assert not word.startswith(("tests/", "nbs/")) or (ROOT / word).exists(), word


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_files_named_in_prose_exist(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    own = {"nbs/08b_rdrop.ipynb", "esci_nb/rdrop.py"}  # what the guide makes
    for name in set(re.findall(r"`((?:nbs|tests|esci_nb|\.github)/[\w./-]*)`", prose)) - own:
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
        assert (path.parent / link).exists(), link


def test_winners_numbers_are_the_slides_own():
    "Every NDCG of four digits near the winners' in guides and chapters is one that FACTS knows, and its page says where it is from."
    known = {"0.9022", "0.9015", "0.9019", "0.9057", "0.9043", "0.9036", "0.9035", "0.9025", "0.9014", "0.9007"}
    for path in (*TEXTS, *sorted(NBS.glob("[0-9]*.ipynb"))):
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")
        else:
            text = re.sub(r"^\|.*\|$", "", path.read_text(), flags=re.M) if path.name == "README.md" else path.read_text()
        numbers = set(re.findall(r"\b0\.90[0-9]{2}\b", text))
        assert numbers <= known, f"{path.name}: {numbers - known}"
        assert not numbers or "[S]" in text or "[T]" in text, f"{path.name} gives {numbers} without a source mark"


def test_nbdev_reads_docstrings_without_running_cells(monkeypatch):
    pytest.importorskip("nbdev")
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults
    monkeypatch.chdir(ROOT)
    notebook = read_nb(NBS / "05_metrics.ipynb")
    FilterDefaults()(notebook)
    shown = ["".join(cell.outputs[0]["data"]["text/markdown"]) for cell in notebook.cells if "show_doc(" in cell.source]
    assert any(text.startswith("### ndcg\n") and "```python\nndcg(query_id" in text for text in shown) and len(shown) > 8


def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "letters.txt").write_text("mine")
    if find_spec("sphinx"):
        assert main(["docs", "--to", str(tmp_path)]) == 2
        assert "not a built site" in capsys.readouterr().err and (tmp_path / "letters.txt").is_file()
    monkeypatch.setitem(sys.modules, "furo", None)
    assert main(["docs", "--to", str(tmp_path / "site")]) == 2
    said = capsys.readouterr().err
    assert "make docs" in said and said.count("\n") == 1 and not (tmp_path / "site").exists()
    monkeypatch.setattr(docs.metadata, "files", lambda name: [])
    with pytest.raises(InputError, match="sphinx-mathjax-offline==0.0.2"):
        docs.mathjax()


def test_a_page_that_is_not_there_and_a_chapter_without_title(tmp_path):
    (tmp_path / "sidebar.yml").write_text("website:\n  sidebar:\n    contents:\n      - section: A\n        contents: [guides/none.md]\n")
    with pytest.raises(InputError, match="guides/none.md"):
        docs.nbs_pages(tmp_path)
    with pytest.raises(InputError, match="no title"):
        docs.page_title({"cells": [{"cell_type": "markdown", "source": "text"}]})


@pytest.fixture(scope="session")
def small_checkout(tmp_path_factory) -> Path:
    "A checkout with an index and one chapter, in which mistakes can be made."
    nbs = tmp_path_factory.mktemp("small") / "nbs"
    nbs.mkdir()
    (nbs / "sidebar.yml").write_text('website:\n  sidebar:\n    contents:\n      - index.ipynb\n      - section: Chapters\n        contents: "0*.ipynb"\n')
    for name in ("styles.css", "icon.svg"):
        shutil.copy(NBS / name, nbs)
    return nbs.parent


def write_page(checkout: Path, name: str, *texts: str) -> None:
    "A notebook of Markdown cells, and one cell that says what it exports."
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text} for text in texts]
    cells.append({"cell_type": "code", "metadata": {}, "source": "#| default_exp tiny", "outputs": [], "execution_count": None})
    notebook = {"cells": cells if name != "index" else cells[:-1], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 4}
    (checkout / "nbs" / f"{name}.ipynb").write_text(json.dumps(notebook))


@needs_sphinx
def test_build_is_strict(small_checkout, tmp_path):
    write_page(small_checkout, "index", "# Home\n> A page.", "Text with $x^2$.")
    write_page(small_checkout, "00_tiny", "# Tiny\n> A chapter.", "## Part\n\nSee chapter *Tiny*.")
    pages, links = docs.build_docs(tmp_path / "site", small_checkout)
    assert pages >= 4 and links > 20 and (tmp_path / "site" / "00_tiny.html").is_file()
    mathjax = (tmp_path / "site" / "_static" / "mathjax.js").read_bytes()
    assert hashlib.sha256(mathjax).hexdigest() == docs.MATHJAX_SHA256
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}
    for text, said in (("### Too deep", "Non-consecutive header level"), ("[x](none.ipynb)", "none.ipynb"), ("<a href='none.html'>x</a>", "none.html"),
                       ("<img src='https://example.org/x.png'>", "example.org")):
        write_page(small_checkout, "00_tiny", "# Tiny\n> A chapter.", text)
        with pytest.raises(RuntimeError, match=re.escape(said)):
            docs.build_docs(tmp_path / "site", small_checkout)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}, "a failed build leaves the last site alone"


@pytest.mark.skipif("CHECK_DOCS" not in os.environ, reason="minutes long: make check-docs runs this")
def test_tutorial_runs(monkeypatch, tmp_path):
    from nbdev.test import test_nb
    monkeypatch.chdir(tmp_path)  # the tutorial goes elsewhere
    passed, _ = test_nb(NBS / "guides" / "tutorial.ipynb", basepath=NBS)
    assert passed
