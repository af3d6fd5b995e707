"""A tiny package and the competition's files, for the tests of the submission."""
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
    from esci_nb.files import write_json
    from esci_nb.hub import quiet
    from esci_nb.model.cross_encoder import CrossEncoder, save_model
    from esci_nb.model.small import matching_encoder, train_tokenizer
    from esci_nb.recipe import make_run
    tokenizer = train_tokenizer(titles, 500)
    with quiet():
        save_model(CrossEncoder(matching_encoder(len(tokenizer), 32, 1, 2, seed=seed)), folder / "model", tokenizer)
    run = make_run(data="sample", seed=seed, text_fields="title", max_length=32, precision="fp32", locales=",".join(locales))
    write_json(run.values() | {"family": f"f{seed}", "covers": list(locales)}, folder / "config.json")
    write_json({"oof_ndcg": cv, "oof_lists": 10}, folder / "metrics.json")
    (folder / "DONE").touch()
    return folder


def tiny_ensemble(folder: Path, runs: Sequence[Path], method: str = "simplex") -> Path:
    "The folder of an ensemble of runs, its method fitted on made-up lists."
    import numpy as np

    from esci_nb.contract import LABELS, LOCALES, PROB_COLUMNS
    from esci_nb.files import read_json, write_json
    from esci_nb.rank.members import align
    from esci_nb.rank.methods import find_method
    rng, n = np.random.default_rng(0), 600
    rows = pd.DataFrame({"example_id": range(n), "query_id": np.repeat(range(n // 10), 10), "product_id": [f"p{i}" for i in range(n)],
                         "product_locale": np.resize(np.repeat(LOCALES, 10), n), "esci_label": rng.choice(LABELS, n), "lexical": rng.random(n),
                         "text": "phone case"})
    tables = {}
    for run in runs:
        own = rows[rows["product_locale"].isin(read_json(run / "config.json")["covers"])]
        truth = np.eye(len(LABELS))[own["esci_label"].map(LABELS.index)]
        probs = 0.5 * truth + 0.5 * rng.dirichlet(np.ones(len(LABELS)), len(own))  # right half of the time, so that each gets a share
        tables[run.name] = own[["example_id"]].assign(**dict(zip(PROB_COLUMNS, probs.T)))
    folder.mkdir(parents=True)
    find_method(method).fit(align(rows, tables)).save(folder)
    write_json({"runs": [str(run) for run in runs], "members": {run.name: [run.name] for run in runs}, "scores": {}}, folder / "config.json")
    return folder


def pack_tiny(folder: Path, titles: Sequence[str], models: Mapping[str, tuple[float, Sequence[str]]], ensemble: Path | None = None) -> None:
    "A package without wheel and notebook: name -> (cv, locales); `ensemble`: the folder of a fitted method over members of these names."
    from esci_nb.ship.package import describe_run, write_package
    write_package(folder, [describe_run(tiny_run(folder.parent / "runs" / name, titles, cv, locales, seed), dict.fromkeys(locales, 0.5))
                           for seed, (name, (cv, locales)) in enumerate(models.items())], ensemble)
