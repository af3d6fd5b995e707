"""README.md from nbs/index.ipynb: its Markdown cells, the tables of its `exec_doc` cells read afresh, and links under the title. Run: make readme"""
import re
from pathlib import Path

from esci_nb.docs import Project, markdown_of, read_notebook, split_directives

ROOT = Path(__file__).resolve().parent.parent
PROJECT = Project.read(ROOT)
OLDEST = re.search(r"^min_python = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1]
TESTS = f"{PROJECT.forge}/actions/workflows/test.yml"
LINKS = " · ".join((f"[![tests]({TESTS}/badge.svg)]({TESTS})", f"[read it as a site]({PROJECT.address})",
                    *(f"[tutorial in {where}]({link})" for where, link in PROJECT.elsewhere("nbs/guides/tutorial.ipynb").items()),
                    f"version {PROJECT.version}, Python {OLDEST} to 3.13, Apache-2.0"))


def readme_text() -> str:
    "What README.md must hold; links that lead from nbs/ lead from the top."
    parts, names = [], {}
    for cell in read_notebook(ROOT / "nbs" / "index.ipynb")["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)", "](nbs/", source))
        else:
            found, code = split_directives(source)
            parts += [markdown_of(code, names)] * ("exec_doc" in found)
    text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    return re.sub(r"^(# .*)\n> (.*)$", rf"\1\n\n\2\n\n{LINKS}", text, count=1, flags=re.M)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text())
