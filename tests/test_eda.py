"""Exploring: the same answers from every kind of source, planted findings found, bad sources refused, figures that everybody can read."""
import base64
import gzip
import json
import shutil
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

matplotlib.use("agg")
from conftest import ROOT, written
from esci_nb import style
from esci_nb.contract import EXAMPLES_FILE, LABELS, LOCALES, PRODUCTS_FILE, PROB_COLUMNS, InputError
from esci_nb.look import error_analysis, explore, labels, product_map, query_list, repeats, texts, words
from esci_nb.look.tables import SOURCES_FILE, Catalogue, EdaData, label_names, open_eda
from esci_nb.run.stages import run_by_name


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
        logits = 1.5 * np.eye(len(LABELS))[gold] + np.random.default_rng(seed).normal(size=(len(rows), len(LABELS)))
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
    memory = EdaData("memory", data.rows, data.queries, Catalogue(pa.Table.from_pandas(esci.products, preserve_index=False)))
    pd.testing.assert_frame_equal(texts.quality_table(data), texts.quality_table(memory))
    pd.testing.assert_frame_equal(repeats.near_duplicates(data), repeats.near_duplicates(memory))
    positions = np.random.default_rng(0).integers(0, len(data.catalogue), 40)
    pd.testing.assert_frame_equal(data.catalogue.take(positions), esci.products.iloc[positions].reset_index(drop=True), check_dtype=False)
    first = data.rows.iloc[7]
    example = esci.examples.iloc[7]
    assert data.catalogue.take([first["product"]])["product_id"].iat[0] == example["product_id"]
    assert data.queries["query"].iat[first["query"]] == example["query"] and LABELS[first["label"]] == example["esci_label"]


def test_take_over_row_groups(tiny_files, data, tmp_path):
    products = pd.read_parquet(tiny_files / PRODUCTS_FILE)
    products.to_parquet(tmp_path / "grouped.parquet", row_group_size=97, index=False)
    grouped = Catalogue(tmp_path / "grouped.parquet")
    positions = np.r_[np.arange(90, 110), 3, 3, len(products) - 1, 0]
    pd.testing.assert_frame_equal(grouped.take(positions), data.catalogue.take(positions))
    assert grouped.take([]).empty


def test_data_folder_is_a_source(prepared, data):
    folder, _ = prepared
    again = open_eda(folder)
    assert again.cleaned and len(again.rows) <= len(data.rows) and again.rows["ranked"].sum() == data.rows["ranked"].sum()
    dirt = texts.cleaning_table(again, 500)[["HTML", "emoji"]]
    assert (dirt.xs("before", level="when") == dirt.xs("after", level="when")).all().all(), "clean texts stay as they are"


def test_tables_count_what_is_there(tiny_files, data):
    examples, products = (pd.read_parquet(tiny_files / name) for name in (EXAMPLES_FILE, PRODUCTS_FILE))
    table = labels.label_table(data)
    train = examples[examples["split"] == "train"]
    assert table.loc["large train"].tolist() == [(train["esci_label"] == label).sum() for label in LABELS]
    brands = products.loc[products["product_brand"].fillna("").str.strip() != "", "product_brand"].str.strip().value_counts()
    tail = texts.tail_table(texts.name_counts(data, "product_brand")).loc["all"]
    assert tail["names"] == len(brands) and np.isclose(tail["one"], (brands == 1).mean())
    blank = products["product_description"].isna().groupby(products["product_locale"]).sum()
    assert (texts.quality_table(data)["blank"].xs("description", level="field") == blank.reindex(list(LOCALES)).to_numpy()).all()
    lists = labels.list_depth(data)
    assert lists["depth"].sum() == (examples["small_version"] == 1).sum()


def test_planted_dirt_and_duplicates_are_found(copied):
    def spoil(products):
        products.loc[:9, "product_title"] = [f"Sturdy red garden chair with cushion and cup holder, set of {n}" for n in range(10)]
        products.loc[10:12, "product_title"] = "exactly the very same title"
        products.loc[:4, "product_color"] = "<b>red</b> \N{PARTY POPPER}"
        return products
    before = texts.quality_table(open_eda(copied)).xs("color", level="field")["HTML"].sum()
    rewrite(copied / PRODUCTS_FILE, spoil)
    data = open_eda(copied)
    assert texts.quality_table(data).xs("color", level="field")[["HTML", "emoji"]].sum().tolist() == [before + 5, 5]
    pairs = repeats.near_duplicates(data)
    assert set(range(13)) <= set(pairs[["first", "second"]].to_numpy().ravel())
    assert pairs.loc[pairs["first"].isin([10, 11]), "similarity"].max() == 1
    cleaned = texts.cleaning_table(data, 10_000).loc["color"]
    assert cleaned.loc["after", ["HTML", "emoji"]].tolist() == [0, 0] and cleaned.loc["before", "HTML"] > 0


def test_conflicting_judgements_are_counted(copied):
    def twice(examples):
        again = examples[examples["query_id"] == examples["query_id"].iat[0]].copy()
        again["query"] = "  " + again["query"].str.upper()
        again["query_id"], again["example_id"] = 10**6, again["example_id"] + 10**6
        again.iloc[:2, again.columns.get_loc("esci_label")] = [{"E": "S"}.get(label, "E") for label in again["esci_label"].iloc[:2]]
        return pd.concat([examples, again])
    before = repeats.repeated_judgements(open_eda(copied)).table.loc["all"]
    rewrite(copied / EXAMPLES_FILE, twice)
    after = repeats.repeated_judgements(open_eda(copied))
    assert after.table.loc["all", "of these with another label"] == before["of these with another label"] + 2
    assert after.conflicts.equals(after.conflicts.T) and repeats.plot_conflicts(after) is not None


def test_official_sources_file(copied):
    ids = pd.read_parquet(copied / EXAMPLES_FILE)["query_id"].unique()
    pd.DataFrame({"query_id": ids[1:], "source": "negations"}).to_csv(copied / SOURCES_FILE, index=False)
    ax = labels.plot_query_types(open_eda(copied))
    kinds = [text.get_text() for text in ax.get_yticklabels()]
    assert any(kind.startswith("negations") for kind in kinds) and "not in the file\n1 queries" in kinds
    (copied / SOURCES_FILE).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"sources\.csv has the columns a, b"):
        open_eda(copied)


@pytest.mark.parametrize(("file", "change", "words"), [
    (PRODUCTS_FILE, lambda table: table.drop(columns="product_brand"), "lacks the column.*product_brand"),
    (PRODUCTS_FILE, lambda table: table.iloc[5:], "catalogue lacks .* judged product"),
    (PRODUCTS_FILE, lambda table: pd.concat([table, table.head(1)]), "twice"),
    (EXAMPLES_FILE, lambda table: table.assign(esci_label="X"), "only 'E'"),
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
    rewrite(copied / EXAMPLES_FILE, lambda table: table.assign(esci_label=None, split="test"))
    data = open_eda(copied)
    with pytest.raises(InputError, match="no labelled judgement"):
        labels.label_table(data)
    assert explore.candidates(data, 0)["label"].eq("").all()


def test_japanese_is_drawn():
    assert style.japanese_font(), "the extra fonts is installed with the tests"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = style.figure(3, 2)
        ax.set_title("本革ランニングシューズ ブラック")
        ax.figure.canvas.draw()


def test_missing_font_is_said(monkeypatch):
    import importlib.util

    from matplotlib import font_manager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    style.japanese_font.cache_clear()
    with pytest.warns(UserWarning, match="No Japanese font.*pip install"):
        assert style.japanese_font() == ""
    style.japanese_font.cache_clear()


def test_looks_differ_in_grey():
    for looks in (style.LABEL_LOOK, style.LOCALE_LOOK):
        grey = [matplotlib.colors.to_rgb(look.colour) @ np.array([0.299, 0.587, 0.114]) for look in looks.values()]
        assert np.diff(grey).min() > 0.12, "from dark to light, in steps that an eye sees without colour"
        assert len({look.hatch for look in looks.values()}) == len(looks)


OTHER_CONTRACT = """
import importlib.util, re, sys
from pathlib import Path
spec = importlib.util.find_spec("esci_nb.contract")
contract = sys.modules["esci_nb.contract"] = importlib.util.module_from_spec(spec)
text = re.sub(r"LABEL_RECORDS = .*?[)][)]\\n", "LABEL_RECORDS = (Label('good', 'good', 1.0, 1.0, '#102030'), Label('fair', 'fair', 0.3, 0.3, '#777777'), "
              "Label('bad', 'bad', 0.0, 0.0, '#eeeecc'))\\n", Path(spec.origin).read_text(), flags=re.S)
text = text.replace("LOCALE_RECORDS = (", "LOCALE_RECORDS = (Locale('fr', 'French', 'fr', ('fra_Latn',), True, '#802020'), ")
exec(compile(text, spec.origin, "exec"), contract.__dict__)
assert contract.LABELS == ("good", "fair", "bad") and contract.LOCALES[0] == "fr"
"""


def test_other_labels_and_a_new_locale():
    "Three classes and the locale fr, each one record in the contract, pass through every table, figure and widget."
    script = OTHER_CONTRACT + f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import other_contract; other_contract.look()"
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_predictions_of_other_data_are_refused(prepared, data):
    folder, runs = prepared
    stranger = folder.parent / "stranger"
    stranger.mkdir(exist_ok=True)
    table = pd.read_parquet(runs[0] / "oof.parquet")
    table.assign(query_id=table["query_id"] + 1).to_parquet(stranger / "oof.parquet")
    (stranger / "DONE").touch()
    with pytest.raises(InputError, match="not about"):
        explore.predictions_of_runs(data, stranger)
    with pytest.raises(InputError, match="no predictions"):
        explore.predictions_of_runs(data, folder)


def test_cards_never_run_what_they_show(copied, prepared):
    rewrite(copied / PRODUCTS_FILE, lambda table: table.assign(product_title="<script>alert(1)</script><img src=x onerror=alert(2)>"))
    rewrite(copied / EXAMPLES_FILE, lambda table: table.assign(query="<b>script</b>"))
    data = open_eda(copied)
    page = explore.cards_html(data, 0, explore.candidates(data, 0))
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "&lt;" in page


def test_mean_over_runs_and_ranks(prepared):
    folder, runs = prepared
    data = open_eda(folder)
    one, other, both = (explore.predictions_of_runs(data, folders) for folders in (runs[0], runs[1], runs))
    assert np.allclose(both[list(PROB_COLUMNS)], (one[list(PROB_COLUMNS)] + other[list(PROB_COLUMNS)]) / 2)
    ranked = data.rows["ranked"]
    assert both.loc[~ranked, "rank"].isna().all() and (both.loc[ranked].groupby(data.rows["query"])["rank"].min() == 1).all()
    compared = error_analysis.disagreement(data, one, other)
    assert compared.predicted.to_numpy().sum() == len(data.rows) and 0 < compared.correlation < 1
    turned = error_analysis.inversions(data, one, 5, above=LABELS[-1])
    label = label_names(data.rows["label"])
    assert (label[turned["upper"]] == LABELS[-1]).all() and (label[turned["lower"]] == LABELS[0]).all() and turned["gap"].is_monotonic_decreasing


def test_table_of_queries(prepared, copied):
    folder, runs = prepared
    data = open_eda(folder)
    predictions = explore.predictions_of_runs(data, runs)
    table = query_list.query_list(data, predictions, query_list.disagreement_of_runs(data, runs))
    assert table["ndcg"].is_monotonic_increasing and (table["disagreement"] > 0).all() and np.allclose(table[list(LABELS)].sum(axis=1), 1)
    assert table["depth"].sum() == data.rows["ranked"].sum() and table["random"].between(0, 1).all()

    rewrite(copied / PRODUCTS_FILE, lambda products: products.assign(product_title="<script>alert(1)</script>"))
    data = open_eda(copied)
    lists = query_list.query_list(data)
    pages = json.loads(gzip.decompress(base64.b64decode(query_list.packed_cards(data, lists.index[:3]))))
    assert list(pages) == lists["query_id"].head(3).astype(str).tolist() and all("<script" not in page and "&lt;script" in page for page in pages.values())
    assert "ndcg" not in lists and "disagreement" not in lists


def test_a_query_can_be_typed_by_its_id(data):
    explorer = explore.Explorer(data)
    explorer.words.value = str(data.queries["query_id"].iloc[5])
    assert explorer.queries.tolist() == [5] and f"query {data.queries['query_id'].iloc[5]} ·" in explorer.cards.value


def test_planted_word_tells_its_label(copied):
    judged = pd.read_parquet(copied / EXAMPLES_FILE)
    chosen = judged.loc[(judged["esci_label"] == LABELS[2]) & (judged["product_locale"] == LOCALES[0]), "product_id"]
    rewrite(copied / PRODUCTS_FILE, lambda table: table.assign(
        product_title=table["product_title"] + np.where(table["product_id"].isin(chosen) & (table["product_locale"] == LOCALES[0]), " spareparts", "")))
    table = words.telling_words(open_eda(copied))
    first = table[(table["locale"] == LOCALES[0]) & (table["label"] == LABELS[2])].iloc[0]
    assert first["words"].endswith("spareparts") and first["share"] > 0.9
    assert not table.loc[table["label"] == LABELS[0], "words"].str.contains("spareparts").any()


def test_map_of_too_few_products(copied, capsys):
    rewrite(copied / EXAMPLES_FILE, lambda table: table.head(5))
    assert product_map.plot_map(product_map.product_map(open_eda(copied))) is None and "too few" in capsys.readouterr().out


def test_explorer_follows_its_widgets(data):
    explorer = explore.Explorer(data)
    pictures = {explorer.picture.value}
    for locale in LOCALES:
        explorer.locale.value = locale
        pictures.add(explorer.picture.value)
        assert set(data.queries["locale"].iloc[explorer.queries]) == {LOCALES.index(locale)}
    assert len(pictures) == 1 + len(LOCALES)
    explorer.locale.value, explorer.brand.value = "all", explorer.brand.options[0]
    assert explorer.brand.options[0] in explorer.cards.value
    explorer.brand.value = "no such brand"
    assert "No query fits" in explorer.cards.value and explorer.number.disabled


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


def test_eda_runs_top_to_bottom(tiny_files, prepared, outputs):
    folder, runs = prepared
    parameters = {"source": str(tiny_files), "run": str(runs[0]), "outputs": str(outputs)}
    page = run_by_name("eda", parameters)
    before = written(outputs)
    assert run_by_name("eda", parameters) == page and written(outputs) == before
    html = page.read_text()
    assert html.count("<img") >= 15 and "model rank" in html and "Traceback" not in html and "jupyter-widgets" not in html
    assert 'href="#Labels,-locales,-lists"' in html and "The answers stand here" not in html, "the list of answers is filled"
    assert "DecompressionStream" in html and 'src="https://' not in html and len(html) < 10e6, "the table needs no network, and the page is no burden"
    assert (page.parent / "DONE").is_file() and (page.parent / "winners.parquet").is_file()
    cells = json.loads((page.parent / "notebook.ipynb").read_text())["cells"]
    pictures = [out["metadata"] for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert pictures and all("width" in picture.get("image/png", {}) for picture in pictures), "every figure is drawn at twice its size"
    stderr = "".join(line for cell in cells for out in cell.get("outputs", []) if out.get("name") == "stderr" for line in out["text"])
    assert "Warning" not in stderr, stderr


def test_errors_run_top_to_bottom(prepared, outputs):
    folder, runs = prepared
    parameters = {"data": str(folder), "runs": [str(runs[0])], "others": [str(runs[1])], "outputs": str(outputs)}
    page = run_by_name("errors", parameters)
    before = written(outputs)
    assert run_by_name("errors", parameters) == page and written(outputs) == before
    html = page.read_text()
    assert html.count("<img") >= 4 and "gap 0." in html and "Both predict the same" not in html and "Traceback" not in html
    assert len(pd.read_parquet(page.parent / "lists.parquet")) > 3
    with pytest.raises(InputError, match="No runs"):
        run_by_name("errors", {"data": str(folder), "runs": []})
