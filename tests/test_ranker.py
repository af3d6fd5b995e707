"""A trained run in use: the ranker and the pipeline agree, files are ranked, and other libraries load what is exported."""
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esci_nb.cli import main
from esci_nb.contract import GAINS, LABELS, LOCALES, PROB_COLUMNS, InputError
from esci_nb.data.load import load
from packing import tiny_ensemble, tiny_run

PAIRS = [("red running shoes", "Trail shoe, red"), ("garden hose", "Hose, 10 m, green, with <b>fittings</b>"), ("a", "b " * 60)]
GAIN = np.array([GAINS[label] for label in LABELS])


@pytest.fixture(scope="module")
def files(tiny_files):
    return load(tiny_files)


@pytest.mark.parametrize("kind", ["run", "ensemble"])
def test_ranker_says_what_the_pipeline_said(made, files, kind):
    from esci_nb import Ranker
    folder = made.runs[0] if kind == "run" else made.ensemble
    before = pd.read_parquet(folder / "test.parquet").sort_values("example_id")
    rows = files.examples[files.examples["example_id"].isin(before["example_id"])].sort_values("example_id", ignore_index=True)
    scored = Ranker.load(folder).score(rows, files.products)
    assert len(scored) == len(before) > 50
    assert np.array_equal(scored[list(PROB_COLUMNS)].to_numpy(), before[list(PROB_COLUMNS)].to_numpy())
    assert np.allclose(scored["score"], before[list(PROB_COLUMNS)].to_numpy() @ GAIN)


def test_one_list_alone_gets_the_same_answer(made, files):
    from esci_nb import Ranker
    before = pd.read_parquet(made.runs[0] / "test.parquet")
    query_id = before["query_id"].iloc[0]
    chosen = before[before["query_id"] == query_id]
    rows = files.examples[files.examples["example_id"].isin(chosen["example_id"])]
    products = rows[["product_id", "product_locale"]].merge(files.products)
    ranked = Ranker.load(made.runs[0]).rank(rows["query"].iloc[0], products, rows["product_locale"].iloc[0])
    after = ranked.set_index("product_id")[list(PROB_COLUMNS)].loc[chosen["product_id"]]
    assert np.abs(after.to_numpy() - chosen[list(PROB_COLUMNS)].to_numpy()).max() < 1e-5
    assert ranked["score"].is_monotonic_decreasing and list(ranked.columns[:5]) == ["score", *PROB_COLUMNS]


def test_weights_of_an_ensemble_count(tmp_path):
    from esci_nb import Ranker
    runs = [tiny_run(tmp_path / "runs" / f"r{seed}", ["red shoe", "blue hose"], 0.8, LOCALES, seed) for seed in (0, 1)]
    one, other, both = (Ranker.load(folder) for folder in (*runs, tiny_ensemble(tmp_path / "ensembles" / "e", runs)))
    titles = ["red shoe", "blue hose", "shoe"]
    apart = [ranker.rank("red", titles).sort_index()[list(PROB_COLUMNS)].to_numpy() for ranker in (one, other)]
    together = both.rank("red", titles).sort_index()[list(PROB_COLUMNS)].to_numpy()
    from esci_nb.rank.methods import load_method
    shares = load_method(tmp_path / "ensembles" / "e").weights
    weights = np.array([shares.get(LOCALES[0], shares[""])[name] for name in ("r0", "r1")])
    assert np.allclose(together, np.tensordot(weights / weights.sum(), apart, 1), atol=1e-6)


def test_files(made, tmp_path, files, capsys):
    test = files.examples[files.examples["split"] == "test"]
    lists = test[test["query_id"].isin(test["query_id"].unique()[:5])]
    lists[["query_id", "query", "product_locale", "product_id"]].to_csv(tmp_path / "queries.csv", index=False)
    files.products.to_csv(tmp_path / "products.csv", index=False)
    words = ["rank", str(tmp_path / "queries.csv"), str(tmp_path / "products.csv"), "--with", str(made.runs[0]), "--to", str(tmp_path / "out.csv")]
    assert main(words) == 0 and f"{len(lists)} pairs" in capsys.readouterr().out
    ranked = pd.read_csv(tmp_path / "out.csv")
    assert len(ranked) == len(lists) and (ranked.groupby("query_id")["rank"].apply(list).map(lambda ranks: ranks == list(range(1, len(ranks) + 1)))).all()
    before = pd.read_parquet(made.runs[0] / "test.parquet")
    both = ranked.merge(before, on=["query_id", "product_id"], suffixes=("", "_before"))
    assert len(both) and np.abs(both["p_E"] - both["p_E_before"]).max() < 1e-5
    lists.iloc[:2][["query_id", "query", "product_locale"]].assign(product_id="none").to_csv(tmp_path / "queries.csv", index=False)
    assert main([*words[:-1], str(tmp_path / "new.csv")]) == 2 and "no products" in capsys.readouterr().err
    assert not (tmp_path / "new.csv").exists()


def altered(run: Path, to: Path, pooling: str) -> Path:
    "A run like `run` whose model pools otherwise, weights of the head and of the layers at random."
    import torch

    from esci_nb.files import read_json, write_json
    from esci_nb.hub import load_tokenizer
    from esci_nb.model.cross_encoder import CrossEncoder, load_model, save_model
    torch.manual_seed(1)
    model = CrossEncoder(load_model(run / "model").backbone, pooling)
    torch.nn.init.normal_(model.head.weight)
    if pooling == "weighted":
        torch.nn.init.normal_(model.layer_scores)
    save_model(model, to / "model", load_tokenizer(str(run / "model")))
    config = read_json(run / "config.json")
    write_json(config | {"recipe": config["recipe"] | {"pooling": pooling}}, to / "config.json")
    write_json(read_json(run / "metrics.json"), to / "metrics.json")
    (to / "DONE").touch()
    return to


def our_logits(run: Path) -> np.ndarray:
    import torch

    from esci_nb.hub import load_tokenizer
    from esci_nb.model.cross_encoder import load_model
    batch = load_tokenizer(str(run / "model"))(*map(list, zip(*PAIRS)), truncation=True, max_length=32, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return load_model(run / "model")(**batch).numpy()


def run_card(folder: Path, monkeypatch) -> list[dict]:
    "The names that each block of code of a model card leaves, after it has run beside the folder."
    monkeypatch.chdir(folder.parent)
    blocks, left = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S), []
    for block in blocks:
        names = {}
        exec(compile(block, "card", "exec"), names)
        left.append(names)
    return left


@pytest.mark.parametrize("pooling", ["cls", "mean", "weighted"])
@pytest.mark.parametrize("single", [False, True], ids=["logits", "score"])
def test_other_libraries_say_the_same(made, tmp_path, monkeypatch, pooling, single):
    from esci_nb.ship.export import export_run
    run = altered(made.runs[0], tmp_path / "runs" / pooling, pooling)
    folder, logits = export_run(run, tmp_path / "exported", single), our_logits(run)
    gain = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) @ GAIN
    assert (folder / "modules.json").exists() == (single or pooling != "cls")
    if pooling == "cls" and not single:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        batch = AutoTokenizer.from_pretrained(folder)(*map(list, zip(*PAIRS)), truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert model.config.id2label == dict(enumerate(LABELS)) and np.abs(model(**batch).logits.numpy() - logits).max() < 1e-3
    pytest.importorskip("sentence_transformers", reason="pip install esci_nb[peers]")
    from sentence_transformers import CrossEncoder
    model = CrossEncoder(str(folder), device="cpu")
    theirs = model.predict(PAIRS)
    assert model.num_labels == (1 if single else len(LABELS)) and not model.trust_remote_code
    assert np.abs(theirs - (gain if single else logits)).max() < (1e-5 if single else 1e-3)
    assert len(run_card(folder, monkeypatch)) == (2 if pooling == "cls" and not single else 1)


def test_the_card_is_filled_from_the_run(made, tmp_path, capsys):
    run = made.runs[0]
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 0 and str(tmp_path / "model") in capsys.readouterr().out
    from esci_nb.files import read_json
    card, metrics = (tmp_path / "model" / "README.md").read_text(), read_json(run / "metrics.json")
    for part in ("oof", "test"):
        assert f"{metrics[f'{part}_ndcg']:.4f} | {metrics[f'{part}_low']:.4f} to {metrics[f'{part}_high']:.4f}" in card
    assert "seed 42" in card and "fold 0" in card and read_json(run / "config.json")["data"] in card
    assert main(["export", str(run), "--to", str(tmp_path / "model")]) == 2 and "not an empty folder" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_what_no_other_library_can_do_is_refused(made, tmp_path):
    from transformers import AutoConfig, AutoModel

    from esci_nb.model.cross_encoder import CrossEncoder, load_model, save_model
    from esci_nb.hub import load_tokenizer
    from esci_nb.ship import export
    run = altered(made.runs[0], tmp_path / "runs" / "pre", "weighted")
    tokenizer = load_tokenizer(str(run / "model"))
    config = AutoConfig.for_model("modernbert", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=48, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    save_model(CrossEncoder(AutoModel.from_config(config), "weighted"), run / "model", tokenizer)
    with pytest.raises(InputError, match="Weighted pooling over a modernbert .* pooling=mean"):
        export.export_run(run, tmp_path / "out")
    with pytest.raises(InputError, match="entity markers"):
        export._check_exportable(export.read_run(run), load_model(made.runs[0] / "model"), ["[BRAND]"])
    assert not (tmp_path / "out").exists()
