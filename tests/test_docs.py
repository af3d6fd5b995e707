"""Pages, guides and README say what is true: names, links, commands and figures; with the docs extra, the built site as well."""
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from esci_nb import docs
from esci_nb.cli import main, make_parser
from esci_nb.contract import InputError

NBS = ROOT / "nbs"
OWN = {"focal", "nbs/332_strategy.focal.ipynb", "esci_nb/strategy/focal.py"}  # what the guide to a strategy of one's own makes
TEXTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((NBS / "guides").glob("*.md"))]
needs_sphinx = pytest.mark.skipif(not (find_spec("sphinx") and find_spec("myst_nb") and find_spec("furo")),
                                  reason="the extra docs is not installed: make check-docs runs this")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    "What Sphinx would read."
    folder = tmp_path_factory.mktemp("sources")
    docs.write_sources(NBS, folder, make_parser())
    return folder


def test_every_notebook_and_guide_is_a_page(sources):
    pages = [path.relative_to(NBS).with_suffix("").as_posix() for path in (*NBS.rglob("*.ipynb"), *(NBS / "guides").glob("*.md"))
             if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)]
    missing = [page for page in pages if not any((sources / f"{page}{end}").is_file() for end in (".ipynb", ".md"))]
    assert len(pages) > 60 and not missing, f"not in nbs/sidebar.yml: {missing}"
    listed = [page for group in docs.nbs_pages(NBS).values() for page in group]
    assert sorted(["index", *listed]) == sorted(pages), "each in one section"


def test_sections_are_packages_in_reading_order():
    sections = docs.nbs_pages(NBS)
    chapters = [page for group in sections.values() for page in group if re.match(r"\d", page)]
    assert chapters == sorted(chapters)
    for section, pages in sections.items():
        assert len({package for page in pages for package in re.findall(r"^\d+_(\w+)\.", page)}) <= 1, section


def test_reference_shows_every_field_and_command(sources):
    from esci_nb.recipe import Recipe, Rounds, Run
    text = (sources / "reference.md").read_text()
    for kind in (Recipe, Rounds, Run):
        part = text.partition(f"#### Fields of {kind.__name__}\n")[2].partition("\n#")[0]
        assert all(f"| `{name}` | {field.description}" in part for name, field in kind.model_fields.items()), kind.__name__
    assert "### esci-nb grid\n" in text and "## Ranking\n" in text and "`from esci_nb.rank.methods import ...`" in text


def test_every_page_says_how_to_run_it(sources):
    for path in (*sources.rglob("*.ipynb"), *sources.rglob("*.md")):
        text = path.read_text().lower()
        assert "run this page" in text or "how to run" in text or "make lab" in text or "nothing to run" in text, path.name


def test_every_public_name_is_a_target_once(sources):
    text = "\n".join("".join(cell["source"]) for path in sources.rglob("*.ipynb") for cell in json.loads(path.read_text())["cells"])
    targets = Counter(re.findall(r"^::::\{py:(function|class)\} (\w+).*\n:module: (\S+)$", text, re.M))
    for path in (ROOT / "esci_nb").rglob("*.py"):
        if path.stem in ("__init__", "_modidx"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                kind = "function" if isinstance(node, ast.FunctionDef) else "class"
                assert targets[kind, node.name, module] == 1, f"{module}.{node.name}"


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
                assert recipe in RECIPES or recipe in OWN, words
            if arguments.command in ("grid", "demo", "ladder"):
                make_recipe(**parse_values(arguments.values))
        else:
            assert not words or name in known, words
        for word in words[1:]:
            assert not word.startswith(("tests/", "nbs/")) or (ROOT / word).exists(), word


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_files_named_in_prose_exist(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for name in set(re.findall(r"`((?:nbs|tests|esci_nb|\.github)/[\w./-]*)`", prose)) - OWN:
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


def test_mistakes_get_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "letters.txt").write_text("mine")
    if find_spec("sphinx"):
        assert main(["docs", "--to", str(tmp_path)]) == 2
        assert "not a built site" in capsys.readouterr().err and (tmp_path / "letters.txt").is_file()
    monkeypatch.setitem(sys.modules, "furo", None)
    assert main(["docs", "--to", str(tmp_path / "site")]) == 2
    sentence = capsys.readouterr().err
    assert "make docs" in sentence and sentence.count("\n") == 1 and not (tmp_path / "site").exists()
    monkeypatch.setattr(docs.metadata, "files", lambda name: [])
    with pytest.raises(InputError, match="sphinx-mathjax-offline==0.0.2"):
        docs.mathjax()


def test_a_page_that_is_not_there_and_a_chapter_without_title(tmp_path):
    (tmp_path / "sidebar.yml").write_text("A: [guides/none.md]\n")
    with pytest.raises(InputError, match="guides/none.md"):
        docs.nbs_pages(tmp_path)
    with pytest.raises(InputError, match="no title"):
        docs.page_title("text\n## Part")


@pytest.fixture(scope="session")
def small_checkout(tmp_path_factory) -> Path:
    "A checkout with an index and one chapter, in which mistakes can be made."
    nbs = tmp_path_factory.mktemp("small") / "nbs"
    nbs.mkdir()
    (nbs / "sidebar.yml").write_text('Chapters: "0*.ipynb"\n')
    for name in ("styles.css", "icon.svg"):
        shutil.copy(NBS / name, nbs)
    return nbs.parent


def write_page(checkout: Path, name: str, *texts: str) -> None:
    "A notebook of Markdown cells, and one cell that says what it exports."
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text} for text in texts]
    cells.append({"cell_type": "code", "metadata": {}, "source": "#| default_exp data.tiny", "outputs": [], "execution_count": None})
    notebook = {"cells": cells if name != "index" else cells[:-1], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 4}
    (checkout / "nbs" / f"{name}.ipynb").write_text(json.dumps(notebook))


@needs_sphinx
def test_build_is_strict(small_checkout, tmp_path):
    write_page(small_checkout, "index", "# Home\n> A page.", "Text with $x^2$.")
    write_page(small_checkout, "010_data.tiny", "# Tiny\n> A chapter.", "## Part\n\nSee chapter *Tiny*.")
    pages, links = docs.build_docs(tmp_path / "site", root=small_checkout)
    assert pages >= 4 and links > 20 and (tmp_path / "site" / "010_data.tiny.html").is_file()
    mathjax = (tmp_path / "site" / "_static" / "mathjax.js").read_bytes()
    assert hashlib.sha256(mathjax).hexdigest() == docs.MATHJAX_SHA256
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}
    for text, warning in (("### Too deep", "Non-consecutive header level"), ("[x](none.ipynb)", "none.ipynb"), ("<a href='none.html'>x</a>", "none.html"),
                       ("<img src='https://example.org/x.png'>", "example.org")):
        write_page(small_checkout, "010_data.tiny", "# Tiny\n> A chapter.", text)
        with pytest.raises(RuntimeError, match=re.escape(warning)):
            docs.build_docs(tmp_path / "site", root=small_checkout)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "site").rglob("*")}, "a failed build leaves the last site alone"


@pytest.mark.skipif("CHECK_DOCS" not in os.environ, reason="minutes long: make check-docs runs this")
def test_tutorial_runs(monkeypatch, tmp_path):
    from nbdev.test import test_nb
    monkeypatch.chdir(tmp_path)  # the tutorial goes elsewhere
    passed, _ = test_nb(NBS / "guides" / "tutorial.ipynb", basepath=NBS)
    assert passed
