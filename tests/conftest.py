"""What several test files share: a tiny data folder, written once a session."""
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "2"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> Path:
    "The embedded sample at a tenth of its size, as files in the official format."
    from esci_nb.sample import write_sample
    folder = tmp_path_factory.mktemp("tiny") / "files"
    write_sample(folder, scale=0.0006)
    return folder
