"""A tiny package and the competition's files, for the tests of the submission."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd


def competition_files(folder: Path, scale: float = 0.001) -> pd.DataFrame:
    "Write the sample's test lists and catalogue as zipped v0.3 files; returns the catalogue."
    from esci_nb.data.sample import make_sample
    folder.mkdir(parents=True)
    esci = make_sample(scale=scale)
    lists = esci.examples[(esci.examples["small_version"] == 1) & (esci.examples["split"] == "test")]
    lists = lists.rename(columns={"product_locale": "query_locale"})[["query_id", "query", "query_locale", "product_id"]]
    lists.to_csv(folder / "test_public-v0.3.csv.zip", index=False)
    esci.products.rename(columns={"product_color": "product_color_name"}).to_csv(folder / "product_catalogue-v0.3.csv.zip", index=False)
    return esci.products


def tiny_run(folder: Path, titles: Sequence[str], cv: float, locales: Sequence[str], seed: int) -> Path:
    "A finished run folder around an untrained model."
    from esci_nb.model.small import matching_encoder, train_tokenizer
    from esci_nb.hub import quiet
    from esci_nb.model.cross_encoder import CrossEncoder
    tokenizer = train_tokenizer(titles, 500)
    with quiet():
        CrossEncoder(matching_encoder(len(tokenizer), 32, 1, 2, seed=seed)).save(folder / "model", tokenizer)
    recipe = {"name": "baseline", "fold": 0, "seed": seed, "text_fields": ["product_title"], "max_length": 32, "precision": "fp32"}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe, "data": "sample", "family": f"f{seed}", "locales": list(locales)}))
    (folder / "metrics.json").write_text(json.dumps({"oof_ndcg": cv, "oof_lists": 10}))
    (folder / "DONE").touch()
    return folder


def pack_tiny(folder: Path, titles: Sequence[str], models: Mapping[str, tuple[float, Sequence[str]]]) -> None:
    "A package without wheel and notebook: name -> (cv, locales)."
    import dataclasses

    from esci_nb.ship.package import FORMAT, MANIFEST, describe_run
    entries = []
    for seed, (name, (cv, locales)) in enumerate(models.items()):
        member = describe_run(tiny_run(folder / name, titles, cv, locales, seed), dict.fromkeys(locales, 0.5))
        entries.append(dataclasses.asdict(member) | {"folder": f"{name}/model"})
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "version": "test", "models": entries, "wheel": {}}))
