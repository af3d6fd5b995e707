"""Pages, guides and README say what is true: names, links, commands and figures; with the docs extra, the built site as well."""
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
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
OWN = {"poly", "nbs/333_strategy.poly.ipynb", "esci_nb/strategy/poly.py"}  # what the guide to a strategy of one's own makes
TEXTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((NBS / "guides").glob("*.md"))]
needs_sphinx = pytest.mark.skipif(not (find_spec("sphinx") and find_spec("myst_nb") and find_spec("furo") and find_spec("sphinx_copybutton")),
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
    recipes = "".join("".join(cell["source"]) for cell in json.loads((sources / "050_recipe.ipynb").read_text())["cells"])
    shown = recipes.partition("::::{py:class} Recipe\n")[2].partition("\n::::")[0]
    assert all(f"| `{name}` | {field.description}" in shown for name, field in Recipe.model_fields.items()), "in its chapter, too"
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


def test_every_parameter_of_the_front_is_explained_and_names_are_used():
    "The page of names explains what functions take, and holds no name that none takes."
    from esci_nb.reference import explained, read_meanings
    pages = [page for group in docs.nbs_pages(NBS).values() for page in group if re.match(r"\d", page)]
    names = (NBS / "guides" / "names.md").read_text()
    targets = docs.Targets.of({page: docs.read_notebook(NBS / f"{page}.ipynb") for page in pages} | {"guides/names": names})
    listed, used, missing, all_of_them = read_meanings(names), set(), [], 0
    for symbol, given in ((one, parameter) for one in targets.symbols for parameter in one.parameters):
        meaning = explained(given, targets.meanings, targets.classes).meaning
        missing += [f"{symbol.target}: {given.name}"] * (not meaning)
        all_of_them += 1
        used |= {key for key in (f"{given.name}: {given.kind}", given.name) if not given.meaning and listed.get(key) == meaning}
    assert len(listed) > 200 and not set(listed) - used, f"no function takes these any more: {sorted(set(listed) - used)}"
    front = re.compile(r"esci_nb\.(contract|metrics|settings|recipe|strategy|rank|ship|run)\b")
    unexplained = [name for name in missing if front.match(name)]
    assert not unexplained, f"{unexplained}: say it in the docstring, or in nbs/guides/names.md where others take it too"
    assert len(missing) < 0.06 * all_of_them, f"{len(missing)} of {all_of_them}: {missing[:5]}"


def test_changelog_begins_with_this_version():
    text = (NBS / "guides" / "changelog.md").read_text()
    assert re.findall(r"^## (\S+)", text, re.M)[0] == docs.Project.read(ROOT).version, "the changelog needs a part about the version of settings.ini"


def test_help_says_what_there_is(capsys):
    from esci_nb.recipe import RECIPES
    for words, expected in (([], ["demo", "--version"]), (["--version"], [f"esci-nb {docs.Project.read(ROOT).version}"]), (["grid", "--help"], list(RECIPES)),
                            (["run", "--help"], [path.stem for path in (NBS / "pipeline").glob("*.ipynb")])):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        shown = capsys.readouterr().out
        assert stopped.value.code == 0 and all(word in shown for word in expected), words
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(re.findall(r"^([a-z-]+) ", listed, re.M)) == set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


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
    known = {"pip", "nbdev_export", "nbdev_clean", "ruff", "python", "papermill", "git", "cd", "unzip", "torchrun", "export", "ray", "kaggle"}
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
    for path in (NBS / "styles.css", NBS / "icon.svg"):
        shutil.copy(path, nbs)
    shutil.copy(ROOT / "settings.ini", nbs.parent)
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
    project, text = docs.Project.read(ROOT), (tmp_path / "site" / "010_data.tiny.html").read_text()
    source = f"{project.branch}/nbs/010_data.tiny.ipynb"
    for expected in (f'rel="canonical" href="{project.address}/010_data.tiny.html"', '<meta name="description" content="A chapter."', f"{project.forge}/blob/{source}",
                     f"{project.forge}/edit/{source}", f"kaggle.com/kernels/welcome?src={project.forge}/blob/{source}", f"esci_nb {project.version}"):
        assert expected in text, expected
    assert "/nbs/reference" not in (tmp_path / "site" / "reference.html").read_text(), "a made page has no source to edit"
    listed = re.findall(r"<loc>(.*)</loc>", (tmp_path / "site" / "sitemap.xml").read_text())
    assert f"{project.address}/010_data.tiny.html" in listed and all((tmp_path / "site" / url.removeprefix(project.address)[1:]).is_file() for url in listed)
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


def test_code_on_pages_is_the_code_of_the_chapters_and_fits(sources):
    "What is shown says the same as the notebook, and only strings and unbroken words are wider than a page."
    from esci_nb.reference import WIDTH

    def same(source: str) -> str:
        tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = " ".join(node.value.split())
        return ast.dump(tree)

    lines = wide = 0
    for path in sorted(NBS.glob("[0-9]*.ipynb"))[::6]:
        before = [docs.split_directives("".join(cell["source"])) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        before = [source for directives, source in before if not directives.keys() & {"hide", "default_exp", "exec_doc"} and source.strip()]
        after = [cell["source"] for cell in json.loads((sources / path.name).read_text())["cells"] if cell["cell_type"] == "code"]
        assert [same(source) for source in after] == [same(source) for source in before], path.name
        shown = "\n".join(after).splitlines()
        lines, wide = lines + len(shown), wide + sum(len(line) > WIDTH and "\"" not in line and "'" not in line for line in shown)
    assert lines > 1000 and wide < 0.003 * lines, f"{wide} of {lines} lines are too wide"


def test_every_function_shows_its_parameters(sources):
    text = "".join("".join(cell["source"]) for cell in json.loads((sources / "640_ship.ranker.ipynb").read_text())["cells"])
    part = text.partition("::::{py:function} rank_files")[2].partition("::::\n")[0].partition("\n::::")[0]
    assert "| parameter | type | default | meaning |" in part
    assert "| `most` | `int` | `20000` | about how many pairs are worked on at a time |" in part and "| `to` | `str \\| Path` |" in part
