"""Odd data sets, as other people have them: each is a function that spoils a small good one in a folder. More than a hundred, by name."""
import shutil
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from esci_nb.contract import EXAMPLE_COLUMNS, EXAMPLES_FILE, LABELS, PRODUCT_COLUMNS, PRODUCTS_FILE, TEXT_FIELDS

WORDS = {"us": "red blue lamp mug shoe steel cotton large", "es": "rojo azul lámpara taza zapato acero algodón grande", "jp": "赤い 青い ランプ マグ 靴 鋼 綿 大きい"}
CASES = {}


def good(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Judgements and products: ten queries of three locales with five products each, the last three of the test split."
    rng = np.random.default_rng(seed)
    examples, products = [], {}
    for query in range(10):
        locale = ("us", "es", "jp")[query % 3]
        words = WORDS[locale].split()
        for place in range(5):
            product = f"{(query * 3 + place) % 25:04d}"
            title, brand, colour = " ".join(rng.choice(words, 4)), f"Acme {place}", words[place % 2]
            products[product, locale] = (product, title, "" if place % 2 else f"<p>{title}</p>", " ".join(rng.choice(words, 3)), brand, colour, locale)
            examples.append((len(examples), f"{words[query % len(words)]} {query}", 100 + query, product, locale, LABELS[(query + place) % len(LABELS)],
                             int(place < 4), 1, "train" if query < 7 else "test"))
    return pd.DataFrame(examples, columns=EXAMPLE_COLUMNS), pd.DataFrame(products.values(), columns=PRODUCT_COLUMNS)


def write(folder: Path, examples, products) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in ((EXAMPLES_FILE, examples), (PRODUCTS_FILE, products)):
        pq.write_table(table, folder / name) if isinstance(table, pa.Table) else table.to_parquet(folder / name)
    return folder


def write_old(folder: Path, examples, products, suffix=".csv", **options) -> Path:
    "As files of the competition."
    folder.mkdir(parents=True, exist_ok=True)
    old = examples.rename(columns={"product_locale": "query_locale"}).drop(columns=["small_version", "large_version", "split"])
    for name, part in (("train", old[examples["split"] == "train"]), ("test", old[examples["split"] == "test"].drop(columns="esci_label"))):
        part.to_csv(folder / f"{name}-v0.3{suffix}", index=False, **options)
    products.rename(columns={"product_color": "product_color_name"}).to_csv(folder / f"product_catalogue-v0.3{suffix}", index=False, **options)
    return folder


def case(make):
    CASES[make.__name__] = make
    return make


def spoil(name: str, examples=None, products=None) -> None:
    "A case in which `examples` and `products` change the good tables."
    def make(folder: Path) -> Path:
        tables = good()
        return write(folder, *(change(table) if change else table for change, table in zip((examples, products), tables)))
    CASES[name] = make


def first(column: str, value):
    "The first row of a column gets a value."
    def change(table):
        table = table.astype({column: object})
        table.loc[table.index[0], column] = value
        return table
    return change


def every(column: str, value):
    return lambda table: table.assign(**{column: value})


def typed(column: str, kind: pa.DataType, encode: bool = False):
    "The tables in Arrow, with a column of another type."
    def change(table):
        table = pa.Table.from_pandas(table, preserve_index=False)
        values = table[column].dictionary_encode().cast(kind) if encode else table[column].cast(kind)
        return table.set_column(table.column_names.index(column), column, values)
    return change


def broken_bytes(column: str, kind: pa.DataType | None = None):
    "One value of a column in latin-1 bytes, as writers that do not check leave it."
    def change(table):
        values = [str(value).encode() for value in table[column]]
        values[2] = "café".encode("latin-1")
        binary = pa.array(values)
        array = pa.Array.from_buffers(pa.string(), len(binary), [None, *binary.buffers()[1:]])
        if kind is not None:
            array = pa.DictionaryArray.from_arrays(pa.array(range(len(array)), pa.int32()), array) if pa.types.is_dictionary(kind) else array.cast(kind)
        table = pa.Table.from_pandas(table, preserve_index=False)
        return table.set_column(table.column_names.index(column), column, array)
    return change


def renumber(values):
    "query_id by the place of the query."
    return lambda table: table.assign(query_id=pd.Series(list(values), dtype=object if any(isinstance(v, str) for v in values) else None)
                                      .take(pd.factorize(table["query"])[0]).to_numpy())


# ids
for name, values in {"19 digits": 10**18 + np.arange(10), "negative": -np.arange(1, 11), "limits": [2**63 - 1, -2**63, *range(8)], "unsigned": np.arange(10, dtype="uint64"),
                     "too large": 2**63 + np.arange(10, dtype="uint64"), "whole floats": np.arange(10.0), "fractions": np.arange(10) + 0.5,
                     "rounded floats": 2.0**60 + np.arange(10) * 2.0**9, "zeros and none": ["007", "7", *"012345", "8", "9"], "plus": [f"+{i}" for i in range(10)],
                     "spaces": [f" {i} " for i in range(10)], "words": list("abcdefghij"), "booleans": [True, False] * 5, "decimals": [Decimal(i) for i in range(10)],
                     "digits of other scripts": list("٠١٢٣٤٥٦٧٨٩"), "long": ["9" * 5000] * 10, "exponents": ["1e3"] * 10, "empty": [""] * 10}.items():
    spoil(f"query_id {name}", renumber(values))
spoil("query_id null", first("query_id", None))
spoil("query_id infinite", lambda table: table.assign(query_id=np.inf))
spoil("query_id categories", lambda table: table.assign(query_id=table["query_id"].astype(str).astype("category")))
spoil("query_id lists", lambda table: table.assign(query_id=[[number] for number in table["query_id"]]))
spoil("query_id dates", lambda table: table.assign(query_id=pd.to_datetime(table["query_id"])))
spoil("example_id 19 digits", lambda table: table.assign(example_id=10**18 + np.arange(len(table))))
spoil("example_id at the limit", lambda table: table.assign(example_id=2**63 - 1 - np.arange(len(table))))
spoil("example_id negative", lambda table: table.assign(example_id=-np.arange(len(table))))
spoil("example_id twice", every("example_id", 5))
for name, product in {"comma": "a,b", "quote": 'a"b', "newline": "a\nb", "return": "a\rb", "NUL": "a\0b", "spaces": "  x ", "NA": "NA", "formula": "=1+1", "hash": "#1",
                      "mark": "\ufeffx", "emoji": "👍", "long": "x" * 100_000, "dots": "../../x", "dollar": "$\\frac{1}{$"}.items():
    spoil(f"product_id {name}", *(lambda table, product=product: table.replace({"product_id": {"0003": product}}) for _ in range(2)))
spoil("product_id numbers", *(lambda table: table.assign(product_id=table["product_id"].astype(int)) for _ in range(2)))

# types of text
for field in ("product_id", "product_title", "product_brand", "product_description", "product_locale"):
    for kind, arrow in {"large": pa.large_string(), "view": pa.string_view(), "bytes": pa.binary(), "large bytes": pa.large_binary()}.items():
        spoil(f"{field} {kind}", None, typed(field, arrow))
    spoil(f"{field} categories", None, typed(field, pa.dictionary(pa.int32(), pa.string()), encode=True))
for field in ("query", "esci_label", "split", "product_locale"):
    spoil(f"{field} ordered categories", typed(field, pa.dictionary(pa.int8(), pa.string(), ordered=True), encode=True))
for field in ("product_id", "product_title", "product_bullet_point", "product_brand"):
    spoil(f"{field} not UTF-8", None, broken_bytes(field))
    spoil(f"{field} not UTF-8 in categories", None, broken_bytes(field, pa.dictionary(pa.int32(), pa.string())))
spoil("query not UTF-8", broken_bytes("query"))
spoil("query not UTF-8 large", broken_bytes("query", pa.large_string()))
for field in TEXT_FIELDS:
    spoil(f"{field} all missing", None, every(field, None))
    spoil(f"{field} all NaN", None, every(field, np.nan))
    spoil(f"{field} all blank", None, every(field, ""))
spoil("everything optional missing", None, lambda table: table.assign(**dict.fromkeys(TEXT_FIELDS[1:], None)))
spoil("lists of bullets", None, lambda table: table.assign(product_bullet_point=[["a", "b"]] * len(table)))
spoil("structs", None, lambda table: table.assign(product_description=[{"a": 1}] * len(table)))
spoil("numbers as brand", None, every("product_brand", 5))
spoil("decimals as colour", None, every("product_color", Decimal("1.5")))
spoil("dates as title", None, every("product_title", pd.Timestamp(0)))
spoil("booleans as description", None, every("product_description", True))
spoil("categories of numbers", None, lambda table: table.assign(product_brand=pd.Categorical([1] * len(table))))
spoil("words of nulls", None, lambda table: table.assign(product_brand="None", product_color="nan", product_description="<NA>"))
spoil("flags as booleans", lambda table: table.assign(small_version=table["small_version"] == 1, large_version=True))
spoil("flags as floats", lambda table: table.astype({"small_version": float}))
spoil("flags as texts", lambda table: table.astype({"small_version": str}))
spoil("flags of null", first("small_version", None))
spoil("labels in words", lambda table: table.assign(esci_label=table["esci_label"].map({"E": "Exact", "S": "substitute", "C": "COMPLEMENT", "I": " irrelevant"})))
spoil("label unknown", first("esci_label", "X"))
spoil("locale unknown", first("product_locale", "uk"))
spoil("split unknown", first("split", "dev"))

# contents
for name, text in {"tags": "<a " * 3000, "closings": "</ " * 3000, "comments": "<!--" * 3000, "scripts": "<script>" * 3000, "entities": "&#38;" * 3000, "emoji": "😀\u200d" * 2000,
                   "mojibake": "Ã³Ã" * 2000, "one word": "x" * 100_000, "accents": "\u0301\u0323" * 5000, "spaces": " \u3000\n" * 5000, "brackets": "[[<" * 3000,
                   "special tokens": "[SEP] </s> <mask> [BRAND] ⟦brand⟧ [PAD]" * 20, "formulas": "$\\frac{1}{$ _{%$" * 5, "NULs": "a\0b" * 50, "returns": "a\r\nb\rc",
                   "right to left": "\u202eabc\u202c" * 50, "arabic": "حذاء أحمر " * 20, "digits": "1.1" * 3000, "nothing visible": "\u200b\u3164\ufeff"}.items():
    spoil(f"title of {name}", None, first("product_title", f"lamp {text}"))
    spoil(f"brand of {name}", None, every("product_brand", text))
    spoil(f"query of {name}", lambda table, text=text: table.replace({"query": {table["query"][0]: f"lamp {text}"}}))
spoil("titles all the same", None, every("product_title", "lamp"))
spoil("one title empty", None, first("product_title", ""))
spoil("titles of emoji", None, every("product_title", "🎁"))
spoil("query empty", first("query", " "))
spoil("queries that differ in case", lambda table: table.assign(query=np.where(table["query_id"] % 2, "Lamp", "LAMP "), product_locale="us"))

# what later stages need
spoil("only test rows", lambda table: table.assign(split="test", esci_label=""))
spoil("only test rows with labels", every("split", "test"))
spoil("no test rows", every("split", "train"))
spoil("one query", lambda table: table.head(5))
spoil("two queries", lambda table: table.head(10))
spoil("one row", lambda table: table.head(1))
spoil("one train query", lambda table: table[(table["query_id"] == 100) | (table["split"] == "test")])
spoil("one locale", lambda table: table[table["product_locale"] == "us"])
spoil("no ranked lists", every("small_version", 0))
spoil("no ranked train lists", lambda table: table.assign(small_version=(table["split"] == "test").astype(int)))
spoil("no ranked test lists", lambda table: table.assign(small_version=(table["split"] == "train").astype(int)))
spoil("lists of one product", lambda table: table.drop_duplicates("query_id"))
for label in LABELS:
    spoil(f"only {label}", every("esci_label", label))
    spoil(f"test labels all {label}", lambda table, label=label: table.assign(esci_label=table["esci_label"].where(table["split"] == "train", label)))
spoil("train unlabelled", lambda table: table.assign(esci_label=table["esci_label"].where(table["split"] == "test", "")))
spoil("test unlabelled", lambda table: table.assign(esci_label=table["esci_label"].where(table["split"] == "train", "")))
spoil("test half labelled", lambda table: table.assign(esci_label=table["esci_label"].where((table["split"] == "train") | (table.index % 2 == 0), "")))
spoil("no rows", lambda table: table.head(0))
spoil("no products", None, lambda table: table.head(0))
spoil("catalogue too small", None, lambda table: table.head(3))
spoil("pair twice with other labels", lambda table: pd.concat([table, table.head(1).assign(example_id=999, esci_label="I")]))
spoil("rows twice", lambda table: pd.concat([table, table.assign(example_id=table["example_id"] + 999)]))
spoil("product twice", None, lambda table: pd.concat([table, table.head(1).assign(product_title="other")]))
spoil("query_id of two texts", every("query_id", 1))
spoil("more columns", lambda table: table.assign(note="x", number=1.5), lambda table: table.assign(note=None))
spoil("column twice", lambda table: (lambda arrow: arrow.append_column("split", arrow["split"]))(pa.Table.from_pandas(table, preserve_index=False)))
spoil("column missing", lambda table: table.drop(columns="small_version"))
spoil("names in capitals", lambda table: table.rename(columns=str.upper))
spoil("index kept", lambda table: table.set_index("example_id"), lambda table: table.set_index("product_id"))


# files
@case
def competition_csv(folder):
    return write_old(folder, *good())


@case
def competition_zip(folder):
    return write_old(folder, *good(), suffix=".csv.zip")


@case
def latin_1(folder):
    return write_old(folder, *good(), encoding="latin-1", errors="replace")


@case
def utf_16(folder):
    return write_old(folder, *good(), encoding="utf-16")


@case
def utf_8_with_mark(folder):
    return write_old(folder, *good(), encoding="utf-8-sig")


@case
def semicolons(folder):
    return write_old(folder, *good(), sep=";")


@case
def windows_line_ends(folder):
    return write_old(folder, *good(), lineterminator="\r\n")


@case
def everything_quoted(folder):
    return write_old(folder, *good(), quoting=1)


@case
def extensions_in_capitals(folder):
    write_old(folder, *good())
    for path in list(folder.iterdir()):
        path.rename(path.with_name(path.name.upper()))
    return folder


def beside(name: str, content: bytes | None = None) -> None:
    "A case with another file beside the good ones: `content`, or a copy of the train file that says otherwise."
    def make(folder):
        write_old(folder, *good())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        old = (folder / "train-v0.3.csv").read_bytes().replace(b",E\n", b",I\n")
        (folder / name).write_bytes(old if content is None else content)
        return folder
    CASES[f"beside {name}"] = make


for name in (".ipynb_checkpoints/train-v0.3-checkpoint.csv", "._train-v0.3.csv", "__MACOSX/._train-v0.3.csv", "train-v0.3.csv~", "#train-v0.3.csv#", "~$train-v0.3.csv",
             ".~lock.train-v0.3.csv#", ".train-v0.3.csv.swp", "$RECYCLE.BIN/train-v0.3.csv", "@eaDir/train-v0.3.csv", ".hidden/train-v0.3.csv", "train-v0.3 (1).csv", "task_2/train-v0.3.csv"):
    beside(name)
for name, content in {"Thumbs.db": b"x", "._x.parquet": b"\0\5\26\7", "readme.csv": b"", "notes.csv": b"a;b\n", "picture.csv": b"\x89PNG\0\0", "more.parquet": b"PAR1"}.items():
    beside(name, content)


def damaged(name: str, change) -> None:
    def make(folder):
        write(folder, *good())
        path = folder / EXAMPLES_FILE
        path.write_bytes(change(path.read_bytes()))
        return folder
    CASES[f"file {name}"] = make


damaged("empty", lambda content: b"")
damaged("cut", lambda content: content[:len(content) // 2])
damaged("without its end", lambda content: content[:-4])
damaged("of zeros", lambda content: bytes(len(content)))
damaged("with a page of noise", lambda content: content[:200] + bytes(range(256)) + content[456:])
damaged("that is html", lambda content: b"<!DOCTYPE html><html>not found</html>")
damaged("that is a pointer", lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4a\nsize 9\n")


@case
def zip_bomb(folder):
    write_old(folder, *good())
    (folder / "train-v0.3.csv").unlink()
    with zipfile.ZipFile(folder / "train-v0.3.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("train-v0.3.csv", "w") as member:
        member.write((folder / "test-v0.3.csv").read_bytes())
        for _ in range(280):
            member.write(b"a" * 2**20)
    return folder


@case
def zip_damaged(folder):
    write_old(folder, *good(), suffix=".csv.zip")
    path = folder / "train-v0.3.csv.zip"
    content = bytearray(path.read_bytes())
    content[80] ^= 255
    path.write_bytes(content)
    return folder


@case
def long_rows(folder):
    write_old(folder, *good())
    (folder / "train-v0.3.csv").open("a").write("1,2,3,4,5,6,7,8,9,10\n")
    return folder


@case
def short_rows(folder):
    write_old(folder, *good())
    (folder / "train-v0.3.csv").open("a").write("1,lamp\n")
    return folder


@case
def open_quotes(folder):
    write_old(folder, *good())
    (folder / "train-v0.3.csv").open("a").write('1,"lamp\n')
    return folder


@case
def header_twice(folder):
    write_old(folder, *good())
    path = folder / "train-v0.3.csv"
    path.write_text(path.read_text().replace("query,", "query,query,", 1))
    return folder


@case
def no_catalogue(folder):
    write_old(folder, *good())
    (folder / "product_catalogue-v0.3.csv").unlink()
    return folder


@case
def only_the_catalogue(folder):
    write(folder, *good())
    (folder / EXAMPLES_FILE).unlink()
    return folder


@case
def an_empty_folder(folder):
    folder.mkdir(parents=True)
    return folder


@case
def a_file_for_a_folder(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("x")
    return folder


@case
def a_folder_for_a_file(folder):
    write(folder, *good())
    (folder / EXAMPLES_FILE).unlink()
    (folder / EXAMPLES_FILE).mkdir()
    return folder


@case
def dead_links(folder):
    write_old(folder, *good())
    (folder / "more.csv").symlink_to(folder / "nowhere.csv")
    (folder / "loop").symlink_to(folder)
    return folder


@case
def released_below_a_folder(folder):
    write(folder / "esci-data" / "shopping_queries_dataset", *good())
    return folder


@case
def released_twice(folder):
    write(folder / "a", *good())
    shutil.copytree(folder / "a", folder / "b")
    return folder


@case
def folder_named_like_a_partition(folder):
    return write(folder.parent / "product_locale=us" / "split=test", *good())


@case
def odd_folder_name(folder):
    return write(folder.parent / "mi dato's [x] {y} $1 ñ", *good())


@case
def sources_of_kinds(folder):
    examples, products = good()
    write(folder, examples, products)
    kinds = pd.DataFrame({"query_id": examples["query_id"].unique(), "source": "$\\frac{1}{$ kind"})
    kinds.to_csv(folder / "shopping_queries_dataset_sources.csv", index=False)
    return folder


@case
def sources_that_contradict(folder):
    sources_of_kinds(folder)
    (folder / "shopping_queries_dataset_sources.csv").open("a").write("100,other\n")
    return folder


@case
def sources_that_are_none(folder):
    sources_of_kinds(folder)
    (folder / "shopping_queries_dataset_sources.csv").write_bytes(b"\xff\xfe\0")
    return folder
