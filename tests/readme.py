"""README.md from nbs/index.ipynb: its Markdown cells, and the tables of its `exec_doc` cells read afresh. Run: make readme"""
import re
from pathlib import Path

from esci_nb.docs import split_directives, markdown_of, read_notebook

ROOT = Path(__file__).resolve().parent.parent


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
    return re.sub(r"^(# .*)\n> (.*)$", r"\1\n\n\2", text, count=1, flags=re.M)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text())
