"""The generated sample: same rows every time, the published shares, sound keys."""
import hashlib
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from esci_nb.contract import EXAMPLE_COLUMNS, EXAMPLES_FILE, PAIR_KEY, PRODUCT_COLUMNS, PRODUCT_KEY, PRODUCTS_FILE, InputError
from esci_nb.data.latent import true_label
from esci_nb.data.load import load
from esci_nb.data.read import Esci
from esci_nb.data.sample import SAMPLE_VERSION, make_sample, write_sample

DIGESTS = {1: "0b5981a8d79ca3bfdac6efb40de9bcea339e14569f931249d9e0e87f851317db"}  # by SAMPLE_VERSION

SMALL_TRAIN = {"E": .437, "S": .342, "C": .052, "I": .169}
LARGE_TRAIN = {"E": .663, "S": .212, "C": .028, "I": .097}
BLANK_US = {"product_brand": .06, "product_bullet_point": .15, "product_color": .33, "product_description": .47}


@pytest.fixture(scope="module")
def sample() -> Esci:
    return make_sample()


def assert_same(first: Esci, second: Esci) -> None:
    pd.testing.assert_frame_equal(first.examples, second.examples)
    pd.testing.assert_frame_equal(first.products, second.products)


def test_same_seed_same_rows(sample):
    assert_same(sample, make_sample())


def digest(sample: Esci) -> str:
    return hashlib.sha256((sample.examples.to_csv(index=False) + sample.products.to_csv(index=False)).encode()).hexdigest()


def test_other_rows_are_another_version(sample):
    assert digest(sample) == DIGESTS[SAMPLE_VERSION], "the rows changed: raise SAMPLE_VERSION and store their digest here"


def with_contract(code: str) -> str:
    "What a fresh process prints that changes the contract before it imports anything else."
    code = "import sys\nimport esci_nb.contract as contract\n" + code
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_a_locale_without_words_is_left_out():
    assert with_contract('''
contract.LOCALE_RECORDS += (contract.Locale("fr", "French", "fr", ("fra_Latn", "fr_XX", ">>fra<<"), True, "#123456"),)
contract.LOCALES += ("fr",)
sys.path.insert(0, "tests")
from test_sample import digest, make_sample
print(digest(make_sample()))
''') == DIGESTS[SAMPLE_VERSION]


def test_other_classes_are_refused_in_one_sentence(tmp_path):
    assert with_contract(f'''
contract.LABEL_RECORDS, contract.LABELS = contract.LABEL_RECORDS[:3], contract.LABELS[:3]
from esci_nb.data.sample import make_sample, write_sample
for call in (make_sample, lambda: write_sample({str(tmp_path / "new")!r}, scale=0.001)):
    try:
        call()
    except contract.InputError as error:
        print(error)
''').splitlines() == ["The embedded sample has the classes E, S, C and I; give your own data."] * 2
    assert not (tmp_path / "new").exists()


def test_other_seed_other_rows():
    first, second = make_sample(scale=.001, seed=1), make_sample(scale=.001, seed=2)
    assert set(first.examples["query"]) != set(second.examples["query"])


@pytest.mark.parametrize("queries_per_chunk", [1, 300, 100_000])
def test_files_hold_the_same_rows(tmp_path, queries_per_chunk):
    paths = write_sample(tmp_path, scale=.004, seed=7, queries_per_chunk=queries_per_chunk)
    assert [path.name for path in paths] == [EXAMPLES_FILE, PRODUCTS_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert_same(load(tmp_path), make_sample(scale=.004, seed=7))


def test_released_columns(sample):
    assert tuple(sample.examples.columns) == EXAMPLE_COLUMNS
    assert tuple(sample.products.columns) == PRODUCT_COLUMNS


@pytest.mark.parametrize("seed", [42, 0, 5])
def test_label_shares_within_three_points(seed):
    examples = make_sample(seed=seed).examples
    train = examples[examples["split"] == "train"]
    for frame, wanted in ((train[train["small_version"] == 1], SMALL_TRAIN), (train, LARGE_TRAIN)):
        got = frame["esci_label"].value_counts(normalize=True)
        assert (got - pd.Series(wanted)).abs().max() <= .03


def test_locale_and_split_shares(sample):
    queries = sample.examples.drop_duplicates("query_id")
    small = queries[queries["small_version"] == 1]
    assert abs((small["product_locale"] == "us").mean() - 29_844 / 48_300) <= .03
    assert abs((queries["product_locale"] == "us").mean() - 97_345 / 130_652) <= .03
    assert abs((small["split"] == "test").mean() - 14_496 / 48_300) <= .03
    assert (sample.examples["large_version"] == 1).all()


def test_list_depths(sample):
    depth = sample.examples.groupby("query_id").size()
    assert abs(depth.mean() / (2_621_288 / 130_652) - 1) < .05
    assert depth.between(16, 40).mean() > .85 and depth.max() > 40 and depth.min() >= 5


def test_blank_rates_and_long_tails(sample):
    own = sample.products[sample.products["product_locale"] == "us"]
    for column, wanted in BLANK_US.items():
        assert abs((own[column] == "").mean() - wanted) <= .03
    brands = sample.products.loc[sample.products["product_brand"] != "", "product_brand"].value_counts()
    colours = sample.products.loc[sample.products["product_color"] != "", "product_color"].value_counts()
    assert abs((brands == 1).mean() - .54) <= .03
    assert abs((brands > 10).mean() - .071) <= .03
    assert (colours == 1).mean() > .8


def test_keys(sample):
    examples, products = sample.examples, sample.products
    assert not products.duplicated(list(PRODUCT_KEY)).any()
    assert not examples.duplicated(list(PAIR_KEY)).any()
    assert examples["example_id"].is_unique
    assert products["product_id"].str.fullmatch("B0[0-9A-Z]{8}").all()
    key = list(PRODUCT_KEY)
    assert pd.MultiIndex.from_frame(examples[key]).isin(pd.MultiIndex.from_frame(products[key])).all()
    assert pd.MultiIndex.from_frame(products[key]).isin(pd.MultiIndex.from_frame(examples[key])).all()
    shared = products["product_id"].duplicated().mean()
    assert 0 < shared < .01


def test_queries_are_unique_and_have_something_to_find(sample):
    queries = sample.examples.drop_duplicates("query_id")
    assert len(queries) == len(sample.examples[["query_id", "query", "split", "small_version"]].drop_duplicates())
    assert not queries.duplicated(["query", "product_locale"]).any()
    test = sample.examples[sample.examples["split"] == "test"]
    assert (test["esci_label"] != "I").groupby(test["query_id"]).any().all()


def test_languages(sample):
    titles = sample.products.set_index("product_locale")["product_title"]
    japanese = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
    assert titles["jp"].str.contains(japanese).all()
    assert not titles[["us", "es"]].str.contains(japanese).any()
    queries = sample.examples.drop_duplicates("query_id").set_index("product_locale")["query"]
    assert queries["jp"].str.contains(japanese).all()
    assert titles["es"].str.contains("[áéíóúñ]").mean() > .2
    assert (titles.str.strip() != "").all()


def test_some_text_is_dirty(sample):
    descriptions = sample.products["product_description"]
    for pattern in ("<b>", "<br>", "<li>", "&nbsp;", "[⭐🎁🔥✅👍]", "â€™|Â"):
        assert 0 < descriptions.str.contains(pattern).mean() < .2


def test_label_rule():
    traits = np.array([3, 2, 1, 0, -1, 4])
    wishes = {"none": [-1] * 6, "met": [3, 2, -1, -1, -1, -1], "missed": [3, 5, -1, -1, -1, -1],
              "unsaid": [-1, -1, -1, -1, 1, -1]}
    labels = [int(true_label(np.array(0), np.array(wish), np.array(0), traits)) for wish in wishes.values()]
    assert labels == [0, 0, 1, 1]
    kinds = [int(true_label(np.array(kind), np.array(wishes["none"]), np.array(product), traits))
             for kind, product in ((0, 1), (0, 2), (2, 0), (2, 3), (0, 4))]
    assert kinds == [1, 2, 2, -1, 3]


@pytest.mark.parametrize("scale", [0, -1, 1.01, float("nan")])
def test_bad_scale(tmp_path, scale):
    for call in (lambda: make_sample(scale=scale), lambda: write_sample(tmp_path / "new", scale=scale)):
        with pytest.raises(InputError, match="scale must be"):
            call()
    assert not (tmp_path / "new").exists()


def test_bad_seed():
    with pytest.raises(InputError, match="seed"):
        make_sample(seed=-1)


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("esci_nb.data.sample.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000_000})())
    with pytest.raises(InputError, match="free"):
        write_sample(tmp_path)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def breaks(scale, seed):
        raise RuntimeError("power cut")
        yield
    monkeypatch.setattr("esci_nb.data.sample._blocks", breaks)
    with pytest.raises(RuntimeError):
        write_sample(tmp_path, scale=.001)
    assert not list(tmp_path.iterdir())


def test_tiny_scale():
    tiny = make_sample(scale=1e-5)
    assert tiny.examples["query_id"].nunique() == 24
    assert set(tiny.examples["split"]) == {"train", "test"}
