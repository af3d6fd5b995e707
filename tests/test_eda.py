"""Exploring: the same answers from every kind of source, planted findings found, bad sources refused, figures that everybody can read."""
import json
import shutil
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

matplotlib.use("agg")
from esci_nb import eda, errors, explore
from esci_nb.contract import LABELS, InputError
from esci_nb.look.eda import EdaData, open_eda
from esci_nb.run.stages import run_by_name

PRODUCTS, EXAMPLES = eda.PRODUCTS_FILE, eda.EXAMPLES_FILE


@pytest.fixture(scope="module")
def data(tiny_files) -> EdaData:
    return open_eda(tiny_files)


@pytest.fixture
def copied(tiny_files, tmp_path):
    "The tiny files where a test may spoil them."
    return shutil.copytree(tiny_files, tmp_path / "files")


def rewrite(path, change) -> None:
    change(pd.read_parquet(path)).to_parquet(path, index=False)


@pytest.fixture(scope="module")
def prepared(tiny_files, tmp_path_factory):
    "A preprocessed data folder and two made-up runs on it."
    from esci_nb.data.folds import make_folds
    from esci_nb.data.load import load
    from esci_nb.data.merge import merge_tasks
    from esci_nb.files import write_table
    from esci_nb.folders import probability_table, save_data
    from esci_nb.data.clean import clean_products, clean_queries
    folder = tmp_path_factory.mktemp("eda") / "data"
    esci = load(tiny_files)
    rows = clean_queries(make_folds(merge_tasks(esci.examples), 2))
    save_data(folder, rows, clean_products(esci.products), {"source": str(tiny_files), "n_folds": 2})
    (folder / "DONE").touch()
    gold = rows["esci_label"].map({label: number for number, label in enumerate(LABELS)}).to_numpy()
    runs = []
    for seed in (0, 1):
        logits = 1.5 * np.eye(4)[gold] + np.random.default_rng(seed).normal(size=(len(rows), 4))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        run = folder.parent / f"made-f0-s{seed}-0000000{seed}"
        for part, split in (("oof", "train"), ("test", "test")):
            where = np.flatnonzero(rows["split"] == split)
            write_table(probability_table(rows, where, p[where]), run / f"{part}.parquet")
        (run / "DONE").touch()
        runs.append(run)
    return folder, runs


def test_files_and_memory_give_the_same_answers(tiny_files, data):
    from esci_nb.data.load import load
    esci = load(tiny_files)
    memory = EdaData("memory", data.rows, data.queries, eda.Catalogue(pa.Table.from_pandas(esci.products, preserve_index=False)))
    pd.testing.assert_frame_equal(eda.field_table(data), eda.field_table(memory))
    pd.testing.assert_frame_equal(eda.near_duplicates(data), eda.near_duplicates(memory))
    wanted = np.random.default_rng(0).integers(0, len(data.catalogue), 40)
    pd.testing.assert_frame_equal(data.catalogue.take(wanted), esci.products.iloc[wanted].reset_index(drop=True), check_dtype=False)
    first = data.rows.iloc[7]
    example = esci.examples.iloc[7]
    assert data.catalogue.take([first["product"]])["product_id"].iat[0] == example["product_id"]
    assert data.queries["query"].iat[first["query"]] == example["query"] and LABELS[first["label"]] == example["esci_label"]


def test_take_over_row_groups(tiny_files, data, tmp_path):
    products = pd.read_parquet(tiny_files / PRODUCTS)
    products.to_parquet(tmp_path / "grouped.parquet", row_group_size=97, index=False)
    grouped = eda.Catalogue(tmp_path / "grouped.parquet")
    wanted = np.r_[np.arange(90, 110), 3, 3, len(products) - 1, 0]
    pd.testing.assert_frame_equal(grouped.take(wanted), data.catalogue.take(wanted))
    assert grouped.take([]).empty


def test_data_folder_is_a_source(prepared, data):
    folder, _ = prepared
    again = open_eda(folder)
    assert again.cleaned and len(again.rows) <= len(data.rows) and again.rows["ranked"].sum() == data.rows["ranked"].sum()
    dirt = eda.cleaning_table(again, 500)[["HTML", "emoji"]]
    assert (dirt.xs("before", level="when") == dirt.xs("after", level="when")).all().all(), "clean texts stay as they are"


def test_tables_count_what_is_there(tiny_files, data):
    examples, products = (pd.read_parquet(tiny_files / name) for name in (EXAMPLES, PRODUCTS))
    table = eda.label_table(data)
    train = examples[examples["split"] == "train"]
    assert table.loc["large train"].tolist() == [(train["esci_label"] == label).sum() for label in LABELS]
    brands = products.loc[products["product_brand"].fillna("").str.strip() != "", "product_brand"].str.strip().value_counts()
    tail = eda.tail_table(eda.name_counts(data, "product_brand")).loc["all"]
    assert tail["names"] == len(brands) and np.isclose(tail["one"], (brands == 1).mean())
    blank = products["product_description"].isna().groupby(products["product_locale"]).sum()
    assert (eda.field_table(data)["blank"].xs("description", level="field") == blank.reindex(["us", "es", "jp"]).to_numpy()).all()
    lists = eda.list_depth(data)
    assert lists["depth"].sum() == (examples["small_version"] == 1).sum()


def test_planted_dirt_and_duplicates_are_found(copied):
    def spoil(products):
        products.loc[:9, "product_title"] = [f"Sturdy red garden chair with cushion and cup holder, set of {n}" for n in range(10)]
        products.loc[10:12, "product_title"] = "exactly the very same title"
        products.loc[:4, "product_color"] = "<b>red</b> \N{PARTY POPPER}"
        return products
    before = eda.field_table(open_eda(copied)).xs("color", level="field")["HTML"].sum()
    rewrite(copied / PRODUCTS, spoil)
    data = open_eda(copied)
    assert eda.field_table(data).xs("color", level="field")[["HTML", "emoji"]].sum().tolist() == [before + 5, 5]
    pairs = eda.near_duplicates(data)
    assert set(range(13)) <= set(pairs[["first", "second"]].to_numpy().ravel())
    assert pairs.loc[pairs["first"].isin([10, 11]), "similarity"].max() == 1
    cleaned = eda.cleaning_table(data, 10_000).loc["color"]
    assert cleaned.loc["after", ["HTML", "emoji"]].tolist() == [0, 0] and cleaned.loc["before", "HTML"] > 0


def test_conflicting_judgements_are_counted(copied):
    def twice(examples):
        again = examples[examples["query_id"] == examples["query_id"].iat[0]].copy()
        again["query"] = "  " + again["query"].str.upper()
        again["query_id"], again["example_id"] = 10**6, again["example_id"] + 10**6
        again.iloc[:2, again.columns.get_loc("esci_label")] = [{"E": "S"}.get(label, "E") for label in again["esci_label"].iloc[:2]]
        return pd.concat([examples, again])
    before = eda.repeated_judgements(open_eda(copied)).table.loc["all"]
    rewrite(copied / EXAMPLES, twice)
    found = eda.repeated_judgements(open_eda(copied))
    assert found.table.loc["all", "of these with another label"] == before["of these with another label"] + 2
    assert found.conflicts.equals(found.conflicts.T) and eda.plot_conflicts(found) is not None


def test_official_sources_file(copied):
    ids = pd.read_parquet(copied / EXAMPLES)["query_id"].unique()
    pd.DataFrame({"query_id": ids[1:], "source": "negations"}).to_csv(copied / eda.SOURCES_FILE, index=False)
    ax = eda.plot_query_types(open_eda(copied))
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert any(label.startswith("negations") for label in labels) and "not in the file\n1 queries" in labels
    (copied / eda.SOURCES_FILE).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"sources\.csv has the columns a, b"):
        open_eda(copied)


@pytest.mark.parametrize(("file", "change", "words"), [
    (PRODUCTS, lambda table: table.drop(columns="product_brand"), "lacks the column.*product_brand"),
    (PRODUCTS, lambda table: table.iloc[5:], "catalogue lacks .* judged product"),
    (PRODUCTS, lambda table: pd.concat([table, table.head(1)]), "twice"),
    (EXAMPLES, lambda table: table.assign(esci_label="X"), "only 'E'"),
])
def test_bad_files_are_refused_in_one_sentence(copied, file, change, words):
    rewrite(copied / file, change)
    with pytest.raises(InputError, match=words) as caught:
        open_eda(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "no/such/folder"])
def test_no_source(source):
    with pytest.raises(InputError):
        open_eda(source)


def test_unlabelled_data_say_so(copied):
    rewrite(copied / EXAMPLES, lambda table: table.assign(esci_label=None, split="test"))
    data = open_eda(copied)
    with pytest.raises(InputError, match="no labelled judgement"):
        eda.label_table(data)
    assert explore.candidates(data, 0)["label"].eq("").all()


def test_japanese_is_drawn():
    assert eda.japanese_font(), "the extra fonts is installed with the tests"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = eda.figure(3, 2)
        ax.set_title("本革ランニングシューズ ブラック")
        ax.figure.canvas.draw()


def test_missing_font_is_said(monkeypatch):
    import importlib.util

    from matplotlib import font_manager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    eda.japanese_font.cache_clear()
    with pytest.warns(UserWarning, match="No Japanese font.*pip install"):
        assert eda.japanese_font() == ""
    eda.japanese_font.cache_clear()


def test_looks_differ_in_grey():
    for looks in (eda.LABEL_LOOK, eda.LOCALE_LOOK):
        grey = [matplotlib.colors.to_rgb(color) @ np.array([0.299, 0.587, 0.114]) for color, *_ in looks.values()]
        assert np.diff(grey).min() > 0.12, "from dark to light, in steps that an eye sees without colour"
        assert len({hatch for _, hatch, *_ in looks.values()}) == len(looks)


def test_predictions_of_other_data_are_refused(prepared, data):
    folder, runs = prepared
    stranger = folder.parent / "stranger"
    stranger.mkdir(exist_ok=True)
    table = pd.read_parquet(runs[0] / "oof.parquet")
    table.assign(query_id=table["query_id"] + 1).to_parquet(stranger / "oof.parquet")
    (stranger / "DONE").touch()
    with pytest.raises(InputError, match="not about"):
        explore.read_predictions(data, stranger)
    with pytest.raises(InputError, match="no predictions"):
        explore.read_predictions(data, folder)


def test_cards_never_run_what_they_show(copied, prepared):
    rewrite(copied / PRODUCTS, lambda table: table.assign(product_title="<script>alert(1)</script><img src=x onerror=alert(2)>"))
    rewrite(copied / EXAMPLES, lambda table: table.assign(query="<b>script</b>"))
    data = open_eda(copied)
    page = explore.cards_html(data, 0, explore.candidates(data, 0))
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "&lt;" in page


def test_mean_over_runs_and_ranks(prepared):
    folder, runs = prepared
    data = open_eda(folder)
    one, other, both = (explore.read_predictions(data, some) for some in (runs[0], runs[1], runs))
    assert np.allclose(both["p_E"], (one["p_E"] + other["p_E"]) / 2)
    ranked = data.rows["ranked"]
    assert both.loc[~ranked, "rank"].isna().all() and (both.loc[ranked].groupby(data.rows["query"])["rank"].min() == 1).all()
    found = errors.disagreement(data, one, other)
    assert found.said.to_numpy().sum() == len(data.rows) and 0 < found.correlation < 1
    turned = errors.inversions(data, one, 5, above="I")
    label = data.rows["label"]
    assert (label[turned["upper"]] == 3).all() and (label[turned["lower"]] == 0).all() and turned["gap"].is_monotonic_decreasing


def test_explorer_follows_its_widgets(data):
    explorer = explore.Explorer(data)
    pictures = {explorer.picture.value}
    for locale in ("us", "es", "jp"):
        explorer.locale.value = locale
        pictures.add(explorer.picture.value)
        assert set(data.queries["locale"].iloc[explorer.found]) == {eda.LOCALES.index(locale)}
    assert len(pictures) == 4
    explorer.locale.value, explorer.brand.value = "all", explorer.brand.options[0]
    assert explorer.brand.options[0] in explorer.cards.value
    explorer.brand.value = "no such brand"
    assert "No query fits" in explorer.cards.value and explorer.number.disabled


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


def test_eda_runs_top_to_bottom(tiny_files, prepared, outputs):
    folder, runs = prepared
    page = run_by_name("eda", {"source": str(tiny_files), "run": str(runs[0]), "outputs": str(outputs)})
    html = page.read_text()
    assert html.count("<img") >= 15 and "model rank" in html and "Traceback" not in html and "jupyter-widgets" not in html
    assert (page.parent / "DONE").is_file() and (page.parent / "winners.parquet").is_file()
    cells = json.loads((page.parent / "notebook.ipynb").read_text())["cells"]
    said = "".join(line for cell in cells for out in cell.get("outputs", []) if out.get("name") == "stderr" for line in out["text"])
    assert "Warning" not in said, said


def test_errors_run_top_to_bottom(prepared, outputs):
    folder, runs = prepared
    page = run_by_name("errors", {"data": str(folder), "runs": [str(runs[0])], "others": [str(runs[1])], "outputs": str(outputs)})
    html = page.read_text()
    assert html.count("<img") >= 4 and "gap 0." in html and "Do they say the same" not in html and "Traceback" not in html
    assert len(pd.read_parquet(page.parent / "lists.parquet")) > 3
    with pytest.raises(InputError, match="No runs"):
        run_by_name("errors", {"data": str(folder), "runs": []})
