"""README.md from nbs/index.ipynb: its Markdown cells and the Markdown that its code cells show. Run: make readme"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme_text() -> str:
    "What README.md must hold."
    parts = []
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        else:
            parts += ["".join(output["data"]["text/markdown"]) for output in cell["outputs"]
                      if "text/markdown" in output.get("data", {})]
    text = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    return re.sub(r"^(# .*)\n> (.*)$", r"\1\n\n\2", text, count=1, flags=re.M)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text())
