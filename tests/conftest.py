"""What several test files share: a tiny data folder, written once per session."""
import gc
import os
from pathlib import Path

import pytest

from esci_nb.run import kernels

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes with a thread each (pytest -n 2) beat one with two
kernels._OF_A_STAGE += ("PYTEST_CURRENT_TEST",)  # else each test would begin a warm process of its own
ROOT = Path(__file__).resolve().parent.parent
QUICK = {"epochs": 1, "precision": "fp32", "max_length": 32, "text_fields": "title"}


def pytest_collection_finish(session):
    "What is imported is no garbage. Each training collects garbage twice, and a small one takes half as long without it."
    gc.freeze()


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


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    "A tiny backbone with its tokenizer, encoded pairs of a rule that it can learn, and the fields of a run over them."
    import numpy as np
    import pandas as pd
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from esci_nb.contract import LABELS
    from esci_nb.hub import quiet
    from esci_nb.model.encode import EncodedPairs
    from esci_nb.model.losses import one_hot_targets
    from esci_nb.strategy.base import TrainingRows
    folder, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    words = [f"w{i}" for i in range(8)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    with quiet():
        BertModel(BertConfig(vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
                  add_pooling_layer=False).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    products = pd.DataFrame({"product_id": [f"p{i}" for i in range(300)], "product_locale": "us",
                             "product_title": [" ".join(rng.choice(words, 5)) for _ in range(300)]})
    asked = products[["product_id", "product_locale"]].assign(query=rng.choice(words, 300))
    labels = np.where(products["product_title"].str.contains("w0"), LABELS[0], LABELS[-1])
    pairs = EncodedPairs(asked, products, tokenizer, ["product_title"], 16, folder / "tokens")
    rows = TrainingRows(np.arange(256), one_hot_targets(labels), np.ones(300, np.float32))
    return {"folder": folder, "tokenizer": tokenizer, "pairs": pairs, "rows": rows,
            "run": dict(backbone=str(folder / "backbone"), lr=1e-3, max_length=16, text_fields="title", epochs=1, precision="fp32")}
