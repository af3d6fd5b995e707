"""What several test files share: a tiny data folder, written once per session."""
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes with a thread each (pytest -n 2) beat one with two
ROOT = Path(__file__).resolve().parent.parent
QUICK = {"epochs": 1, "precision": "fp32", "max_length": 32, "text_fields": "title"}


def written(folder: Path) -> dict[Path, int]:
    "The files under a folder and when each was written."
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> Path:
    "The embedded sample at a tenth of its size, as files in the official format."
    from esci_nb.data.sample import write_sample
    folder = tmp_path_factory.mktemp("tiny") / "files"
    write_sample(folder, scale=0.0006)
    return folder


@pytest.fixture(scope="session")
def made(tiny_files, tmp_path_factory):
    "One demo run over the tiny files."
    from esci_nb.run.demo import run_everything
    outputs = tmp_path_factory.mktemp("work") / "outputs"
    return run_everything(str(tiny_files), n_folds=2, outputs=outputs, **QUICK)
