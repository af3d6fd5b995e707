"""Data: what the notebook does not show - bad input of every kind, the competition's files, downloads, real data."""
import hashlib
import http.server
import shutil
import threading
import warnings
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from esci_nb.contract import EXAMPLE_COLUMNS, EXAMPLES_FILE, LABEL_RECORDS, PAIR_KEY, PRODUCT_COLUMNS, PRODUCTS_FILE, InputError
from esci_nb.data import read
from esci_nb.data.download import FILES, RemoteFile, download
from esci_nb.data.folds import check_folds, make_folds
from esci_nb.data.load import fingerprint, load
from esci_nb.data.merge import join_products, merge_tasks
from esci_nb.data.read import as_text, read_examples, read_products
from esci_nb.rank.submission import check_submission, write_ranked

REAL_SUBSET = Path(__file__).resolve().parents[1] / ".." / "shared" / "esci-real"


def make_products() -> pd.DataFrame:
    return pd.DataFrame([
        ("0001", "Tin mug, 300 ml", "<p>For camp fires</p>", "Light\nStackable", "Kettlewood", "Blue", "us"),
        ("0002", "Mug \"Best Baker\"", "", "", "", "", "us"),
        ("0003", "Saucer", "", "NA", "null", "White", "us"),
        ("0001", "Taza de hojalata", "", "", "Kettlewood", "Azul", "es"),
        ("0004", "ホーロー マグ", "", "", "", "青", "jp"),
    ], columns=PRODUCT_COLUMNS)


def make_examples() -> pd.DataFrame:
    return pd.DataFrame([
        (0, "camping mug", 5, "0001", "us", "E", 1, 1, "train"),
        (1, "camping mug", 5, "0002", "us", "S", 1, 1, "train"),
        (2, "camping mug", 5, "0003", "us", "C", 1, 1, "train"),
        (3, "taza, \"grande\"", 6, "0001", "es", "I", 1, 1, "train"),
        (4, "マグ", 7, "0004", "jp", "E", 0, 1, "train"),
        (5, "tea cup", 8, "0002", "us", "E", 1, 1, "test"),
        (6, "tea cup", 8, "0003", "us", "S", 1, 1, "test"),
    ], columns=EXAMPLE_COLUMNS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "A good data set in the released format."
    return write_released(tmp_path / "esci")


def write_released(folder: Path, examples: pd.DataFrame | None = None, products: pd.DataFrame | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (make_examples() if examples is None else examples).to_parquet(folder / EXAMPLES_FILE)
    (make_products() if products is None else products).to_parquet(folder / PRODUCTS_FILE)
    return folder


def write_competition(folder: Path, suffix: str, examples: pd.DataFrame | None = None) -> Path:
    "The same data as the competition handed it out: a folder per task, v0.3 names, words as labels, test labels hidden."
    examples = make_examples() if examples is None else examples
    words = {label.code: spell(label.name) for label, spell in zip(LABEL_RECORDS, (str, str, str.title, str.upper))}
    old = examples.replace({"esci_label": words}).rename(columns={"product_locale": "query_locale"})
    old = old.drop(columns=["example_id", "small_version", "large_version", "split"])
    is_list, is_test = examples["small_version"] == 1, examples["split"] == "test"
    for task in ("task_1", "task_2"):
        (folder / task).mkdir(parents=True)
    old[is_list & ~is_test].to_csv(folder / f"task_1/train-v0.3{suffix}", index=False)
    old[is_test].drop(columns="esci_label").to_csv(folder / f"task_1/test_public-v0.3{suffix}", index=False)
    old[~is_test].to_csv(folder / f"task_2/train-v0.3{suffix}", index=False)
    catalogue = make_products().rename(columns={"product_color": "product_color_name"})
    catalogue.to_csv(folder / f"task_1/product_catalogue-v0.3{suffix}", index=False)
    catalogue.to_csv(folder / f"task_2/product_catalogue-v0.3{suffix}", index=False)
    return folder


def message_of(function, *arguments, **options) -> str:
    "The message of the InputError that the call raises: one line, one sentence."
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 900
    return message


# --- good input ------------------------------------------------------------------------------------------------------

def test_released_pair_keeps_every_value(folder):
    esci = load(folder)
    pd.testing.assert_frame_equal(esci.examples, make_examples())
    pd.testing.assert_frame_equal(esci.products, make_products())
    assert repr(esci) == "Esci(7 judgements of 4 queries, 5 products)"


def test_missing_text_becomes_an_empty_string(tmp_path):
    products = make_products().replace("", None)
    assert products["product_brand"].isna().any()
    pd.testing.assert_frame_equal(load(write_released(tmp_path / "x", products=products)).products, make_products())


@pytest.mark.parametrize("suffix", [".csv", ".csv.zip"])
def test_competition_files_equal_the_release(tmp_path, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what tasks share is expected, not worth a warning
        esci = load(write_competition(tmp_path, suffix))
    expected = make_examples().drop(columns="example_id").sort_values(list(PAIR_KEY), ignore_index=True)
    expected.loc[expected["split"] == "test", "esci_label"] = ""
    found = esci.examples.drop(columns="example_id").sort_values(list(PAIR_KEY), ignore_index=True)
    pd.testing.assert_frame_equal(found, expected)
    pd.testing.assert_frame_equal(esci.products, make_products())
    assert esci.examples["example_id"].is_unique


def test_unpacked_file_beside_its_zip_is_read_once(tmp_path):
    write_competition(tmp_path, ".csv.zip")
    for path in list(tmp_path.rglob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(path.parent)
    assert len(load(tmp_path).examples) == 7


def test_files_without_query_ids_get_those_of_the_same_text(tmp_path):
    write_competition(tmp_path, ".csv")
    path = tmp_path / "task_2/train-v0.3.csv"
    pd.read_csv(path, dtype=str).drop(columns="query_id").to_csv(path, index=False)
    ids = load(tmp_path).examples.drop_duplicates("query").set_index("query")["query_id"]
    assert ids[["camping mug", "tea cup"]].tolist() == [5, 8]
    assert ids["マグ"] == 9  # in no file with numbers: the next free one


def test_labelled_copy_of_a_test_pair_is_left_out(tmp_path):
    write_competition(tmp_path, ".csv")
    path = tmp_path / "task_2/train-v0.3.csv"
    path.write_text(path.read_text() + "tea cup,8,0002,us,exact\n")
    cup = load(tmp_path).examples.query("query_id == 8 and product_id == '0002'")
    assert cup[["split", "esci_label", "small_version"]].values.tolist() == [["test", "", 1]]


def test_substitute_files_are_skipped_aloud_only_when_they_add_pairs(tmp_path):
    write_competition(tmp_path, ".csv")
    (tmp_path / "task_3").mkdir()
    header = "query,query_id,product_id,query_locale,substitute_label\n"
    (tmp_path / "task_3/train-v0.3.csv").write_text(header + "camping mug,5,0002,us,substitute\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
    (tmp_path / "task_3/train-v0.3.csv").write_text(header + "plate,9,0002,us,no_substitute\n")
    with pytest.warns(UserWarning, match="task_3.*1 pair without"):
        assert len(load(tmp_path).examples) == 7


def test_a_single_train_file_holds_the_ranked_lists(tmp_path):
    make_examples().iloc[:5].drop(columns=["small_version", "split"]).to_csv(tmp_path / "train.csv", index=False)
    make_products().to_csv(tmp_path / "products.csv", index=False)
    assert load(tmp_path).examples["small_version"].eq(1).all()


def test_split_is_read_from_the_file_name_as_a_word(tmp_path):
    rows = make_examples().drop(columns="split")
    for name, split in {"train-v0.3.csv": "train", "test_public.csv": "test", "latest.csv": "train"}.items():
        rows.to_csv(tmp_path / name, index=False)
        assert set(read_examples(tmp_path / name)["split"]) == {split}
    assert set(read_examples(tmp_path / "latest.csv", split="test")["split"]) == {"test"}


def test_exact_repeats_are_dropped_with_a_count(tmp_path):
    examples = pd.concat([make_examples(), make_examples().head(2)])
    products = pd.concat([make_products(), make_products().head(3)])
    with pytest.warns(UserWarning) as caught:
        esci = load(write_released(tmp_path / "x", examples, products))
    assert (len(esci.examples), len(esci.products)) == (7, 5)
    assert ["2 rows" in str(caught[0].message), "3 rows" in str(caught[1].message)] == [True, True]


def test_one_blank_title_in_a_large_catalogue_is_only_a_warning(tmp_path):
    products = pd.concat([make_products().iloc[[0]]] * 2000, ignore_index=True)
    products["product_id"] = products.index.astype("str")
    products.loc[7, "product_title"] = None
    products.to_parquet(tmp_path / "products.parquet")
    with pytest.warns(UserWarning, match="product_title, is empty in 1 row .product_id '7'"):
        assert len(read_products(tmp_path / "products.parquet")) == 2000


@pytest.mark.parametrize("suffix", [".csv", ".csv.zip"])
def test_capitals_in_file_names_change_nothing(tmp_path, suffix):
    small = write_competition(tmp_path / "small", suffix)
    shutil.copytree(small, tmp_path / "capitals")
    for path in list((tmp_path / "capitals").rglob("*.*")):
        path.rename(path.with_name(path.name.upper()))
    for table in ("examples", "products"):
        pd.testing.assert_frame_equal(getattr(load(small), table), getattr(load(tmp_path / "capitals"), table))
    assert fingerprint(small)[1] == fingerprint(tmp_path / "capitals")[1]


def test_capitals_in_the_released_names_change_nothing(folder, tmp_path):
    capitals = tmp_path / "capitals"
    capitals.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, capitals / path.name.upper())
    pd.testing.assert_frame_equal(load(capitals).examples, load(folder).examples)
    assert fingerprint(capitals)[1] == fingerprint(folder)[1]


def hide_rubbish(folder: Path) -> None:
    "Leave behind what systems and editors leave behind."
    for name in (".hidden.csv", "__MACOSX/._train.csv", ".ipynb_checkpoints/train-checkpoint.csv", "task_1/.~lock.train.csv", ".git/products.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no table \0")


@pytest.mark.parametrize("name", ["._train.csv", "__MACOSX/._train.csv", ".ipynb_checkpoints/train-checkpoint.csv", "train.csv~", "#train.csv#", "~$train.csv", "#train.csv",
                                  ".~lock.train.csv#", "$RECYCLE.BIN/train.csv", "@eaDir/train.csv", "lost+found/train.csv", "backup~/train.csv", "Thumbs.db"])
def test_editors_copies_are_no_data(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "train (1).csv").touch()
    assert [path.name for path in read.table_files(tmp_path)] == ["train (1).csv"]


def test_hidden_files_are_no_data(tmp_path):
    folder = write_competition(tmp_path / ".cache" / "shop", ".csv")  # that the folder itself is hidden does not matter
    before, loaded = fingerprint(folder), load(folder)
    hide_rubbish(folder)
    pd.testing.assert_frame_equal(load(folder).examples, loaded.examples)
    assert fingerprint(folder) == before


def test_fingerprint_is_of_contents_not_of_places(folder, tmp_path):
    name, content = fingerprint(folder)
    assert name == "esci" and len(content) == 16
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "linked").symlink_to(folder)
    assert fingerprint(tmp_path / "copy") == ("copy", content) and fingerprint(str(tmp_path / "linked")) == ("esci", content)
    (tmp_path / "copy" / "other.csv").write_text("a,b\n1,2\n")  # load does not read it beside the release
    assert fingerprint(tmp_path / "copy")[1] == content
    make_examples().iloc[:-1].to_parquet(tmp_path / "copy" / EXAMPLES_FILE)
    assert fingerprint(tmp_path / "copy")[1] != content
    assert "no folder" in message_of(fingerprint, tmp_path / "nowhere") and "is a file" in message_of(fingerprint, folder / EXAMPLES_FILE)


def test_fingerprint_of_the_sample_is_its_version(monkeypatch):
    from esci_nb.data import sample
    first = fingerprint("sample")
    monkeypatch.setattr(sample, "SAMPLE_VERSION", sample.SAMPLE_VERSION + 1)
    assert fingerprint("sample")[0] == first[0] == "sample" and fingerprint("sample")[1] != first[1]


def test_byte_order_mark_is_no_part_of_a_name(tmp_path):
    make_products().to_csv(tmp_path / "products.csv", index=False, encoding="utf-8-sig")
    assert len(read_products(tmp_path / "products.csv")) == 5


def test_sample_has_the_columns_of_the_release():
    esci = load("sample")
    assert tuple(esci.examples.columns) == EXAMPLE_COLUMNS and tuple(esci.products.columns) == PRODUCT_COLUMNS


@pytest.mark.skipif(not REAL_SUBSET.is_dir(), reason="the real subset is not on this machine")
def test_real_subset():
    esci = load(REAL_SUBSET)
    assert (len(esci.examples), len(esci.products)) == (13566, 13203)
    assert esci.examples.loc[esci.examples["small_version"] == 1, "query_id"].nunique() == 225
    rows = make_folds(merge_tasks(esci.examples), n_folds=5, over="ranked")
    assert len(join_products(rows, esci.products)) == len(rows)
    lists = rows[rows["source"] == "task1"]
    assert lists.groupby("query_id")["fold"].nunique().max() == 1 and lists["fold"].nunique() == 5


# --- bad input -------------------------------------------------------------------------------------------------------

def change(column: str, row: int, value):
    "A function that puts one wrong value into a table."
    def changed(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.copy()
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        return frame
    return changed


def repeat(row: int, **changes):
    "A function that appends a copy of a row with other values in some columns."
    return lambda frame: pd.concat([frame, frame.iloc[[row]].assign(**changes)], ignore_index=True)


BAD_EXAMPLES = {
    "missing column": (lambda f: f.drop(columns="esci_label"), ["esci_label", "lacks"]),
    "no locale": (lambda f: f.drop(columns="product_locale"), ["product_locale", "lacks"]),
    "query_id in words": (lambda f: f.assign(query_id="q" + f["query_id"].astype(str)), ["query_id", "'q5'", "7 rows"]),
    "query_id with a fraction": (lambda f: f.assign(query_id=f["query_id"] + .5), ["query_id", "'5.5'"]),
    "query_id missing": (lambda f: f.assign(query_id=f["query_id"].where(f.index > 0)), ["query_id", "1 row"]),
    "product_id as numbers": (lambda f: f.assign(product_id=f["product_id"].astype(int)), ["product_id", "zeros"]),
    "product_id missing": (change("product_id", 1, None), ["product_id", "empty in 1 row"]),
    "query empty": (change("query", 4, "  "), ["column query,", "empty in 1 row"]),
    "unknown locale": (change("product_locale", 3, "uk"), ["product_locale", "'uk'", "'us'"]),
    "unknown label": (change("esci_label", 3, "Great"), ["esci_label", "'Great'", "1 row"]),
    "unlabelled train row": (change("esci_label", 0, ""), ["esci_label", "1 train row"]),
    "unknown split": (change("split", 0, "dev"), ["split", "'dev'"]),
    "flag out of range": (change("small_version", 0, 2), ["small_version"]),
    "pair with two labels": (repeat(0, esci_label="I", example_id=99), ["'5 / 0001 / us'", "1 pair twice"]),
    "example_id twice": (change("example_id", 6, 0), ["example_id", "(0)"]),
    "query_id with two texts": (change("query", 1, "mug for camping"), ["query_id", "(5)", "texts"]),
    "query_id in two locales": (repeat(0, product_locale="es", example_id=99), ["query_id", "(5)", "locales"]),
    "product not in the catalogue": (change("product_id", 1, "9999"), ["catalogue", "'9999 / us'"]),
    "product of another locale": (change("product_id", 4, "0001"), ["catalogue", "'0001 / jp'"]),
    "no rows": (lambda f: f.head(0), ["no rows"]),
}
BAD_PRODUCTS = {
    "missing column": (lambda f: f.drop(columns="product_brand"), ["product_brand", "lacks"]),
    "title missing": (change("product_title", 2, None), ["product_title", "'0003'"]),
    "title blank": (change("product_title", 2, " \t"), ["product_title", "'0003'"]),
    "unknown locale": (change("product_locale", 0, "US"), ["product_locale", "'US'"]),
    "brand as numbers": (lambda f: f.assign(product_brand=1.5), ["product_brand", "float64", "1.5"]),
    "product twice": (repeat(1, product_title="Another mug"), ["'0002 / us'", "1 product twice"]),
    "product_id missing": (change("product_id", 0, None), ["product_id", "empty in 1 row"]),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_bad_examples(tmp_path, case):
    spoil, expected = BAD_EXAMPLES[case]
    message = message_of(load, write_released(tmp_path / "x", examples=spoil(make_examples())))
    assert str(tmp_path) in message
    assert all(part in message.replace(str(tmp_path), "") for part in expected), message


@pytest.mark.parametrize("case", BAD_PRODUCTS)
def test_bad_products(tmp_path, case):
    spoil, expected = BAD_PRODUCTS[case]
    message = message_of(load, write_released(tmp_path / "x", products=spoil(make_products())))
    assert all(part in message.replace(str(tmp_path), "") for part in [PRODUCTS_FILE, *expected]), message


def zip_of(**members: bytes):
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.csv", content)
    return write


def cut_in_half(write):
    def written(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return written


def flip_a_byte(path: Path) -> None:
    zip_of(products=GOOD_CSV * 20)(path)
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(bytes(content))


GOOD_CSV = make_products().to_csv(index=False).encode()
HEADER = ",".join(PRODUCT_COLUMNS).encode() + b"\n"
BAD_FILES = {
    "missing": ("products.csv", lambda path: None, "no file"),
    "empty": ("products.csv", lambda path: path.write_bytes(b""), "0 bytes"),
    "other ending": ("products.xlsx", lambda path: path.write_bytes(b"x"), "'.xlsx'"),
    "parquet cut": ("products.parquet", cut_in_half(lambda path: make_products().to_parquet(path)), "whole parquet"),
    "parquet that is csv": ("products.parquet", lambda path: path.write_bytes(GOOD_CSV), "whole parquet"),
    "csv that is parquet": ("products.csv", lambda path: make_products().to_parquet(path), "not text"),
    "csv in latin-1": ("products.csv", lambda path: path.write_bytes(GOOD_CSV.replace(b"Blue", b"Caf\xe9")), "UTF-8"),
    "csv cut inside quotes": ("products.csv", lambda path: path.write_bytes(GOOD_CSV.partition(b"Stack")[0]), "cut"),
    "csv cut inside a row": ("products.csv", lambda path: path.write_bytes(GOOD_CSV.partition(b",null")[0]), "locale"),
    "csv with long rows": ("products.csv", lambda path: path.write_bytes(GOOD_CSV + b"1,2,3,4,5,6,7,8,9\n"), "saw 9"),
    "csv of long rows": ("products.csv", lambda path: path.write_bytes(HEADER + b"1,2,3,4,5,6,7,8\n"), "more cells"),
    "csv of another table": ("products.csv", lambda path: path.write_bytes(b"a,b\n1,2\n"), "it has a, b"),
    "csv header only": ("products.csv", lambda path: path.write_bytes(HEADER), "no rows"),
    "csv blank lines only": ("products.csv", lambda path: path.write_bytes(b"\n\n"), "no csv"),
    "zip that is none": ("products.csv.zip", lambda path: path.write_bytes(GOOD_CSV), "whole zip"),
    "zip cut": ("products.csv.zip", cut_in_half(zip_of(products=GOOD_CSV * 20)), "whole zip"),
    "zip damaged": ("products.csv.zip", flip_a_byte, "whole zip"),
    "zip of two": ("products.csv.zip", zip_of(one=GOOD_CSV, two=GOOD_CSV), "2 csv files ('one.csv', 'two.csv')"),
    "zip of hidden": ("products.csv.zip", zip_of(**{"__MACOSX/._products": GOOD_CSV, "._products": GOOD_CSV}), "0 csv files"),
    "zip of none": ("products.csv.zip", zip_of(), "0 csv files"),
    "Git LFS pointer": ("products.parquet", lambda path: path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4a\nsize 9\n"), "Git LFS"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    name, write, expected = BAD_FILES[case]
    write(tmp_path / name)
    message = message_of(read_products, tmp_path / name)
    assert str(tmp_path / name) in message
    assert expected in message.replace(str(tmp_path), ""), message


def test_column_twice(tmp_path):
    frame = make_examples().assign(query_locale="us")
    frame.to_csv(tmp_path / "train.csv", index=False)
    assert "'product_locale' twice" in message_of(read_examples, tmp_path / "train.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_optional_column_twice(tmp_path, suffix):
    table = pa.Table.from_pandas(make_examples(), preserve_index=False)
    table = table.append_column("split", table["split"])
    pa_csv.write_csv(table, tmp_path / "train.csv") if suffix == ".csv" else pq.write_table(table, tmp_path / "train.parquet")
    assert "'split' twice" in message_of(read_examples, tmp_path / f"train{suffix}")


TEXT_TYPES = {
    "text": pa.string(), "large": pa.large_string(), "view": pa.string_view(), "bytes": pa.binary(),
    "categories": pa.dictionary(pa.int32(), pa.string()), "ordered categories": pa.dictionary(pa.int8(), pa.string(), ordered=True),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_every_type_of_text_is_the_same_text(tmp_path, kind):
    products = make_products().replace("", None)
    table = pa.Table.from_pandas(products, preserve_index=False)
    columns = [column.dictionary_encode().cast(TEXT_TYPES[kind]) if "categories" in kind else column.cast(TEXT_TYPES[kind]) for column in table.columns]
    pq.write_table(pa.table(columns, table.column_names), tmp_path / "products.parquet")
    pd.testing.assert_frame_equal(read_products(tmp_path / "products.parquet"), make_products().astype("str"))


NULLS = {"object": pd.Series(["a", None, float("nan"), pd.NA], dtype=object), "python": pd.Series(["a", None, None, None], dtype="string[python]"),
         "arrow": pd.Series(["a", None, None, None], dtype="string[pyarrow]"), "ArrowDtype": pd.Series(["a", None, None, None], dtype=pd.ArrowDtype(pa.string())),
         "categorical": pd.Series(pd.Categorical(["a", None, None, None], ordered=True)), "all": pd.Series([None] * 4), "nan": pd.Series([float("nan")] * 4),
         "null category": pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([pa.DictionaryArray.from_arrays([0, 1, None, 1], ["a", None])])))}


@pytest.mark.parametrize("kind", NULLS)
def test_a_null_is_a_null(kind):
    text = as_text(NULLS[kind], "here")
    assert text.tolist() == ["" if kind in ("all", "nan") else "a", "", "", ""] and text.dtype == pd.Series(["a"]).astype("str").dtype


@pytest.mark.parametrize("values", [[["a"], ["b"]], [1, 2], pd.Categorical([1, 2]), [Decimal("1.5"), None], ["a", 1], [True, None], [{"a": 1}],
                                    [pd.Timestamp(0)], [b"\xe9"], ["\ud800"]], ids=str)
def test_what_is_no_text_is_refused(values):
    assert "column product_title" in message_of(as_text, pd.Series(values, name="product_title", dtype=None if isinstance(values, pd.Categorical) else object), "here")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("column", ["product_id", "product_title", "product_description"])
def test_text_that_is_not_utf8_names_file_column_and_row(tmp_path, kind, column):
    products = make_products()
    values = pa.array([value.encode() for value in products[column]][:3] + ["café".encode("latin-1")] + [b"x"])
    offsets, data = values.buffers()[1:]
    broken = pa.Array.from_buffers(pa.string(), 5, [None, offsets, data])
    broken = pa.DictionaryArray.from_arrays(pa.array(range(5), pa.int32()), broken) if pa.types.is_dictionary(kind) else broken.cast(kind)
    table = pa.Table.from_pandas(products, preserve_index=False)
    pq.write_table(table.set_column(table.column_names.index(column), column, broken), tmp_path / "products.parquet")
    message = message_of(read_products, tmp_path / "products.parquet")
    assert str(tmp_path / "products.parquet") in message and f"column {column}, is not UTF-8" in message and "data row 4" in message


IDS = {"19 digits": 10**18 + np.arange(7), "negative": -np.arange(1, 8), "limits": [2**63 - 1, -2**63, 0, 1, 2, 3, 4], "unsigned": np.arange(7, dtype="uint64"),
       "floats": np.arange(7.0), "texts": [f" {number}" for number in range(2**62, 2**62 + 7)], "decimals": [Decimal(10**18 + number) for number in range(7)]}
BAD_IDS = {"unsigned": np.arange(2**63, 2**63 + 7, dtype="uint64"), "rounded floats": 2.0**53 + np.arange(1, 8) * 2, "small floats": np.float32(2**24) + np.arange(1, 8, dtype="float32") * 4,
           "zeros": ["007", "7", "8", "9", "10", "11", "12"], "plus": [f"+{number}" for number in range(7)], "booleans": [True, False, True, True, True, True, True],
           "too large": [str(2**63)] * 7, "many digits": ["9" * 5000] * 7, "a hole": [1, 2, 3, 4, 5, 6, None], "words": list("abcdefg"), "-0": ["-0"] * 7,
           "other digits": ["٣"] * 7, "underscores": ["1_0"] * 7, "infinite": [np.inf] * 7}


@pytest.mark.parametrize("kind", IDS)
def test_ids_pass_loader_writer_and_checker(tmp_path, kind):
    examples = make_examples().assign(example_id=IDS[kind], query_id=IDS[kind], query=list("abcdefg"))
    esci = load(write_released(tmp_path / "x", examples=examples))
    expected = [int(value) for value in IDS[kind]]
    assert esci.examples["query_id"].tolist() == esci.examples["example_id"].tolist() == expected
    path = write_ranked(esci.examples[["product_id", "query_id"]], tmp_path / "submission.csv")
    assert check_submission(path, esci.examples)["queries"] == 7


@pytest.mark.parametrize("kind", BAD_IDS)
@pytest.mark.parametrize("column", ["query_id", "example_id"])
def test_ids_that_cannot_be_exact_are_refused(tmp_path, kind, column):
    examples = make_examples().assign(**{column: BAD_IDS[kind]})
    assert f"column {column}, is no whole number" in message_of(load, write_released(tmp_path / "x", examples=examples))


@pytest.mark.parametrize("product", ["007", "a,b", 'a"b', "a\nb", "a\rb", " 7", "NA", "=1+1", "#x", "\ufeffx"], ids=repr)
def test_product_ids_pass_loader_writer_and_checker(tmp_path, product):
    products, examples = (table.replace({"product_id": {"0003": product}}) for table in (make_products(), make_examples()))
    esci = load(write_released(tmp_path / "x", examples, products))
    assert product in esci.examples["product_id"].tolist()
    path = write_ranked(esci.examples[["product_id", "query_id"]], tmp_path / "submission.csv")
    assert check_submission(path, esci.examples)["rows"] == 7


def test_a_nul_is_no_part_of_a_key_and_a_space_in_a_text():
    column = pd.Series(["a\0b", "a\0c", "a"], name="product_id")
    assert "NUL character in 2 rows" in message_of(as_text, column, "here", True)
    assert as_text(column, "here").tolist() == ["a b", "a c", "a"]


def test_numbers_of_new_queries_never_run_over(tmp_path):
    write_competition(tmp_path, ".csv")
    path = tmp_path / "task_1/train-v0.3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.assign(query_id=(2**63 - 1 - pd.factorize(table["query"])[0]).astype(str)).to_csv(path, index=False)
    for other in set(tmp_path.rglob("t*.csv")) - {path}:
        pd.read_csv(other, dtype=str, keep_default_na=False).drop(columns="query_id").to_csv(other, index=False)
    examples = load(tmp_path).examples
    assert examples["query_id"].max() == 2**63 - 1 and not examples.drop_duplicates(["query", "product_locale"])["query_id"].duplicated().any()


def test_a_zip_that_unpacks_to_more_than_a_table_can_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "products.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("products.csv", "w") as member:
        for _ in range(300):
            member.write(b"\0" * 2**20)
    assert "times its size" in message_of(read_products, tmp_path / "products.csv.zip")


def test_a_parquet_file_of_absurdly_many_rows_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(read.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(10_000))
    make_products().to_parquet(tmp_path / "products.parquet")
    read_products(tmp_path / "products.parquet")
    pd.concat([make_products()] * 100).to_parquet(tmp_path / "many.parquet")
    assert "memory free" in message_of(read_products, tmp_path / "many.parquet")


def test_folders_that_hold_no_data(tmp_path, folder):
    assert "no folder" in message_of(load, tmp_path / "nowhere")
    assert "is a file" in message_of(load, folder / EXAMPLES_FILE)
    (tmp_path / "bare").mkdir()
    assert "no catalogue" in message_of(load, tmp_path / "bare")
    make_products().to_csv(tmp_path / "bare/products.csv", index=False)
    assert "no judgements" in message_of(load, tmp_path / "bare")
    (folder / PRODUCTS_FILE).unlink()
    assert PRODUCTS_FILE in message_of(load, folder)


def test_competition_files_that_contradict(tmp_path):
    write_competition(tmp_path, ".csv")
    path = tmp_path / "task_2/train-v0.3.csv"
    good = path.read_text()
    path.write_text(good.replace("camping mug,5,0001,us,exact", "camping mug,5,0001,us,irrelevant"))
    assert "in two ways" in message_of(load, tmp_path)
    path.write_text(good)
    (tmp_path / "task_1/train-v0.3.csv").rename(tmp_path / "lists.csv")
    path.rename(tmp_path / "pairs.csv")
    assert "'lists.csv', 'pairs.csv'" in message_of(load, tmp_path)


def test_bad_arguments(tmp_path):
    rows = merge_tasks(make_examples())
    assert "'dev'" in message_of(read_examples, tmp_path / "x.csv", split="dev")
    assert "'task3'" in message_of(merge_tasks, make_examples(), weights={"task3": 1})
    assert "-1" in message_of(merge_tasks, make_examples(), weights={"task2": -1})
    assert "n_folds is 1" in message_of(make_folds, rows, n_folds=1)
    assert "n_folds is '3'" in message_of(make_folds, rows, n_folds="3")
    assert "'all'" in message_of(make_folds, rows, over="all")
    assert "no label" in message_of(make_folds, rows.assign(esci_label=""), over="ranked")
    assert "lacks the column(s) source;" in message_of(make_folds, rows.drop(columns="source"))
    assert "'0003 / us'" in message_of(join_products, rows, make_products().drop(index=2))
    assert "'0001 / us'" in message_of(join_products, rows, pd.concat([make_products(), make_products().head(1)]))


# --- merging and folds -----------------------------------------------------------------------------------------------

def test_merge_keeps_one_row_a_pair_and_the_ranked_list_wins():
    examples = pd.concat([make_examples().iloc[[0]].assign(small_version=0, example_id=50), make_examples()])
    rows = merge_tasks(examples)
    assert rows.attrs["dropped"]["pairs held twice"] == 1
    assert 50 not in rows["example_id"].tolist() and len(rows) == 7
    assert rows["weight"].dtype == "float32"


def test_merge_drops_leaks_by_id_and_by_text():
    leaks = pd.DataFrame([(20, "tea cup", 8, "0001", "us", "I", 0, 1, "train"),
                          (21, "ＴＥＡ \u3000cup", 30, "0001", "us", "I", 1, 1, "train"),
                          (22, "tea cup", 31, "0001", "es", "I", 1, 1, "train"),
                          (23, "spoon", 32, "0002", "us", "E", 0, 1, "test")], columns=EXAMPLE_COLUMNS)
    rows = merge_tasks(pd.concat([make_examples(), leaks]))
    assert rows["example_id"].tolist() == [0, 1, 2, 3, 4, 5, 6, 22]
    assert list(rows.attrs["dropped"].values()) == [1, 1, 1, 0]


def many_rows(seed: int = 0, queries: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), rng.integers(1, 40, queries))
    frame = pd.DataFrame({"query_id": query, "query": pd.Series(query % 350).map("words {}".format)})
    frame["example_id"] = frame.index
    frame["product_id"] = frame.index.astype("str")
    frame["product_locale"] = np.where(query % 350 % 5 == 0, "es", "us")
    frame["split"] = np.where(query % 350 % 7 == 0, "test", "train")
    frame["source"] = np.where(query % 350 % 2 == 0, "task1", "task2")
    return frame.assign(esci_label="E", weight=np.float32(1))


@pytest.mark.parametrize("over", ["train", "ranked"])
@pytest.mark.parametrize("n_folds", [2, 3, 10])
def test_folds_hold_together_what_shares_its_text(over, n_folds):
    folded = make_folds(many_rows(), n_folds=n_folds, over=over)
    assert folded["fold"].dtype == "int8"
    assert folded.groupby(["product_locale", "query"])["fold"].nunique().max() == 1
    assert set(folded["fold"]) == set(range(-1, n_folds))
    in_folds = folded[folded["fold"] >= 0]
    for _, part in in_folds.groupby(["product_locale", "source"]):
        sizes = part.groupby("fold").size().reindex(range(n_folds), fill_value=0)
        assert sizes.max() - sizes.min() <= 80
    if over == "ranked":
        assert (folded["split"] == "train").all() and (in_folds["source"] == "task1").all()
    else:
        assert folded.loc[folded["fold"] == -1, "split"].eq("test").all()


def test_folds_depend_on_the_seed_only():
    first, again, other = (make_folds(many_rows(), seed=seed)["fold"] for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_more_folds_than_queries_spreads_them():
    folded = make_folds(merge_tasks(make_examples()), n_folds=9)
    assert folded[folded["split"] == "train"].groupby("query_id")["fold"].first().is_unique


def test_join_keeps_order_index_and_counts():
    rows = merge_tasks(make_examples()).iloc[::-1]
    joined = join_products(rows, make_products())
    assert joined.index.tolist() == rows.index.tolist() and joined["query"].tolist() == rows["query"].tolist()
    assert joined.loc[joined["product_locale"] == "es", "product_title"].tolist() == ["Taza de hojalata"]
    assert joined.attrs["dropped"] == rows.attrs["dropped"]


# --- download --------------------------------------------------------------------------------------------------------

CONTENTS = bytes(range(256)) * 400


class Server(http.server.BaseHTTPRequestHandler):
    "A file server with moods: `ranges` (honour Range), `cut` (hang up at that byte), `status` (answer only that)."
    ranges, cut, status = True, None, 200

    def do_GET(self):
        if self.status != 200:
            self.send_error(self.status)
            return
        wish = self.headers.get("Range")
        type(self).asked.append(wish)
        start = int(wish.removeprefix("bytes=").rstrip("-")) if wish and self.ranges else 0
        self.send_response(206 if wish and self.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENTS) - start))
        self.end_headers()
        self.wfile.write(CONTENTS[start:self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"asked": []})
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    handler.address = f"http://127.0.0.1:{web.server_port}/data/"
    yield handler
    web.shutdown()
    web.server_close()
    thread.join()


RIGHT = RemoteFile("some.bin", len(CONTENTS), hashlib.sha256(CONTENTS).hexdigest())


def test_download_fresh_then_skipped(tmp_path, server):
    paths = download(tmp_path / "new", server.address, [RIGHT])
    assert paths == [tmp_path / "new/some.bin"] and paths[0].read_bytes() == CONTENTS
    assert download(tmp_path / "new", server.address, [RIGHT]) == paths
    assert server.asked == [None] and [path.name for path in (tmp_path / "new").iterdir()] == ["some.bin"]


def test_download_goes_on_after_a_cut(tmp_path, server):
    server.cut = 70_000
    assert "70,000 of 102,400 bytes" in message_of(download, tmp_path, server.address, [RIGHT])
    assert (tmp_path / "some.bin.part").stat().st_size == 70_000 and not (tmp_path / "some.bin").exists()
    server.cut = None
    assert download(tmp_path, server.address, [RIGHT])[0].read_bytes() == CONTENTS
    assert server.asked == [None, "bytes=70000-"]


def test_download_starts_over_without_ranges(tmp_path, server):
    server.ranges = False
    (tmp_path / "some.bin.part").write_bytes(b"old" * 100)
    assert download(tmp_path, server.address, [RIGHT])[0].read_bytes() == CONTENTS
    assert server.asked == ["bytes=300-"]


def test_download_replaces_a_wrong_file_and_a_whole_part_needs_no_server(tmp_path, server):
    (tmp_path / "some.bin").write_bytes(b"x" * len(CONTENTS))
    (tmp_path / "some.bin.part").write_bytes(CONTENTS)
    assert download(tmp_path, server.address, [RIGHT])[0].read_bytes() == CONTENTS
    assert server.asked == []


@pytest.mark.parametrize("size, sha256", [(len(CONTENTS), "0" * 64), (5000, RIGHT.sha256)], ids=["hash", "longer"])
def test_download_of_something_else_is_removed(tmp_path, server, size, sha256):
    file = RemoteFile("some.bin", size, sha256)
    message = message_of(download, tmp_path, server.address, [file])
    assert "not the expected file" in message and server.address in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [b"<html>error</html>", CONTENTS[:50_000][::-1], CONTENTS[::-1]], ids=["page", "other bytes", "all other bytes"])
def test_a_part_that_is_no_part_of_the_file_is_thrown_away(tmp_path, server, part):
    (tmp_path / "some.bin.part").write_bytes(part)
    assert download(tmp_path, server.address, [RIGHT])[0].read_bytes() == CONTENTS
    assert server.asked[-1] is None and [path.name for path in tmp_path.iterdir()] == ["some.bin"]


def test_an_error_page_is_not_written_and_a_good_part_stays(tmp_path, server):
    good = CONTENTS[:50_000]
    (tmp_path / "some.bin.part").write_bytes(good)
    bigger = RemoteFile("some.bin", len(CONTENTS) + 5, RIGHT.sha256)
    assert "not the expected file" in message_of(download, tmp_path, server.address, [bigger])
    assert (tmp_path / "some.bin.part").read_bytes() == good


def test_two_downloads_at_once_fetch_once(tmp_path, server):
    with ThreadPoolExecutor(4) as pool:
        assert all(paths[0].read_bytes() == CONTENTS for paths in pool.map(lambda _: download(tmp_path, server.address, [RIGHT]), range(4)))
    assert server.asked == [None]


def test_download_refused_or_unreachable(tmp_path, server):
    server.status = 404
    assert "/data/some.bin answered 404" in message_of(download, tmp_path, server.address, [RIGHT])
    assert "Connection refused" in message_of(download, tmp_path, "http://127.0.0.1:9", [RIGHT])
    assert "unknown url type" in message_of(download, tmp_path, "no-address", [RIGHT])
    (tmp_path / "taken").write_text("a file")
    assert "cannot be made" in message_of(download, tmp_path / "taken", server.address, [RIGHT])


def test_download_checks_the_disk_first(tmp_path, server, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**6, 950_000, 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    message = message_of(download, tmp_path, server.address, [RIGHT])
    assert "0.1 MB" in message and server.asked == []
    (tmp_path / "some.bin.part").write_bytes(CONTENTS[:60_000])  # only the rest has to fit
    assert download(tmp_path, server.address, [RIGHT])[0].exists()


def test_official_files_are_the_published_ones():
    sizes = {file.name: file.size for file in FILES}
    assert sizes == {EXAMPLES_FILE: 51_286_808, PRODUCTS_FILE: 1_108_857_465}
    assert all(len(file.sha256) == 64 for file in FILES)


def test_gaps_are_said_and_empty_folds_refused(capsys, tmp_path):
    from esci_nb.cli import main
    cases = {"nothing can be trained": make_examples().assign(split="test"), "1 train query text cannot fill 3 folds": make_examples().iloc[[0, 1, 2, 5, 6]],
             "have the label E": make_examples().assign(esci_label="E"), "perhaps placeholders": make_examples().assign(esci_label=list("ESCEEII")),
             "No train row is in a ranked list": make_examples().assign(small_version=0)}
    for number, (said, examples) in enumerate(cases.items()):
        folder = write_released(tmp_path / str(number), examples)
        assert main(["check", str(folder)]) == 0
        assert said in capsys.readouterr().out
    rows = make_folds(merge_tasks(cases["1 train query text cannot fill 3 folds"]))
    for fold in (0, 1, 2):
        assert f"Fold {fold} has no rows to train on" in message_of(check_folds, rows, [fold])
    check_folds(rows, [-1])
    assert "no train rows" in message_of(check_folds, make_folds(merge_tasks(cases["nothing can be trained"])), [-1])
