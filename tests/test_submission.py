"""The submission file: round trip, and one clear sentence for each way in which a file can be wrong."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esci_nb.contract import GAINS_SWAPPED, LABELS, PROB_COLUMNS, InputError
from esci_nb.metrics import gains_of, ndcg, ranking_score
from esci_nb.rank.submission import check_submission, rank_pairs, read_candidates, write_submission
from esci_nb.ship.first import find_attached
from esci_nb.ship.inference import products_of

PRODUCT_IDS = ["B01", "0012", "NA", "null", 'a,"b"']
GOOD = 'product_id,query_id\nB01,7\n0012,7\nNA,7\nnull,3\n"a,""b""",3\n'


@pytest.fixture
def probs() -> pd.DataFrame:
    "Two queries, with product ids that a careless reader would change."
    frame = pd.DataFrame({"query_id": [7, 7, 7, 3, 3], "product_id": PRODUCT_IDS, "product_locale": "us"})
    frame[list(PROB_COLUMNS)] = [[.9, .1, 0, 0], [.5, .3, .1, .1], [.1, .1, .1, .7],
                                           [.8, .1, .1, 0], [0, 0, 0, 1]]
    return frame


def refusal(tmp_path: Path, content: str | bytes, probs: pd.DataFrame) -> str:
    "The message for a file with this content: one sentence that names the file."
    path = tmp_path / "submission.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        check_submission(path, probs[["query_id", "product_id"]])
    message = str(caught.value)
    assert "submission.csv" in message and "\n" not in message
    return message


def test_round_trip(tmp_path, probs):
    path = write_submission(probs, tmp_path / "a" / "b" / "submission.csv")
    assert path.read_text() == GOOD
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]
    assert check_submission(path, probs) == {"rows": 5, "queries": 2, "products": 5, "interleaved_queries": 0}


@pytest.mark.parametrize("content, interleaved", [
    ('query_id,product_id\n7,B01\n7,0012\n7,NA\n3,null\n3,"a,""b"""\n', 0),                   # the other column order
    ("\ufeff" + GOOD.replace("\n", "\r\n"), 0),                                               # as spreadsheets write it
    ('rank,product_id,query_id\n1,B01,7\n1,null,3\n2,0012,7\n2,"a,""b""",3\n3,NA,7\n', 2),    # one more column, mixed
])
def test_harmless_variants(tmp_path, probs, content, interleaved):
    path = tmp_path / "submission.csv"
    path.write_text(content, newline="")
    assert check_submission(path, probs)["interleaved_queries"] == interleaved


@pytest.mark.parametrize("content, part", [
    ("", "is empty"),
    ("\n\n", "is empty"),
    ("product_id,query_id\n", "no rows"),
    (GOOD.replace("query_id", "query"), "lacks the column(s) query_id"),
    (GOOD.replace(",", ";"), "lacks the column(s) product_id, query_id"),
    (GOOD.replace("0012,7\n", ""), "lacks 1 of 5 candidates, such as product 0012 of query 7"),
    (GOOD.replace("0012", "12"), "lacks 1 of 5 candidates, such as product 0012 of query 7"),
    (GOOD.replace("null,3\n", ""), "lacks 1 of 5 candidates, such as product null of query 3"),
    (GOOD + "B01,3\n", "1 rows that are no candidates, such as product B01 of query 3"),
    (GOOD + "NA,7\nB01,7\n", "2 candidates more than once, such as product NA of query 7"),
    (GOOD.replace("B01,7", "B01,7.0"), "no integers in 1 row(s), such as ['7.0']"),
    (GOOD.replace("B01,7", "B01,seven"), "no integers in 1 row(s), such as ['seven']"),
    (GOOD.replace("B01,7", "B01"), "no integers in 1 row(s), such as ['']"),
    (GOOD.replace("B01,7", ",7"), "blank product_id in 1 row(s), first in data row 1"),
    (GOOD.replace("B01,7", "B01,7,0.93"), "is not a UTF-8 CSV"),
    (GOOD.replace("null,3", '"null,3'), "is not a UTF-8 CSV"),
    (b"PAR1\x15\x04\x15\xff\xfe\x00PAR1", "is not a UTF-8 CSV"),
    (b"PK\x03\x04\x14\x00\x00\x00", "lacks the column(s)"),
])
def test_defects(tmp_path, probs, content, part):
    assert part in refusal(tmp_path, content, probs)


def test_missing_file_and_folder(tmp_path, probs):
    for path in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(InputError, match="is not a file"):
            check_submission(path, probs)


@pytest.mark.parametrize("change, part", [
    ({"p_I": np.nan}, "no probabilities"),
    ({"p_I": 2.0}, "no probabilities"),
    ({"p_E": -.5, "p_S": .5, "p_C": .5, "p_I": .5}, "no probabilities"),
    ({"product_id": "B01"}, "more than once"),
    ({"product_id": None}, "is missing"),
])
def test_bad_probabilities_write_nothing(tmp_path, probs, change, part):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(InputError, match=part):
        write_submission(probs.assign(**change), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, probs, monkeypatch):
    path = write_submission(probs, tmp_path / "submission.csv")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_submission(probs.iloc[::-1], path)
    assert path.read_text() == GOOD and len(list(tmp_path.iterdir())) == 1


def test_order_is_deterministic_and_best_by_expected_gain(probs):
    assert rank_pairs(probs.iloc[[1, 0, 2, 4, 3]]).equals(rank_pairs(probs))
    tied = probs.assign(p_E=.25, p_S=.25, p_C=.25, p_I=.25)
    assert rank_pairs(tied).product_id.tolist() == ["0012", "B01", "NA", 'a,"b"', "null"]
    assert ranking_score(probs)[1] == pytest.approx(.5 + .03 + .001)
    assert ranking_score(probs, GAINS_SWAPPED)[1] == pytest.approx(.5 + .003 + .01)


def test_the_file_scores_what_the_probabilities_score(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"query_id": np.repeat(np.arange(200), 20), "product_id": [f"P{n:05d}" for n in range(4_000)]})
    frame[list(PROB_COLUMNS)] = rng.dirichlet(np.ones(4), len(frame))
    frame["gain"] = gains_of(rng.choice(LABELS, len(frame)))
    direct = ndcg(frame.query_id, frame.gain, ranking_score(frame))
    read = pd.read_csv(write_submission(frame, tmp_path / "s.csv")).merge(frame, on=["query_id", "product_id"])
    through_file = ndcg(read.query_id, read.gain, -np.arange(len(read)))
    pd.testing.assert_series_equal(direct, through_file)


def test_a_test_file_as_large_as_the_real_one(tmp_path):
    "14,496 lists in the real shares of the locales, as the zipped file of the competition: read, written, checked, found wrong."
    from esci_nb.data.sample import make_sample
    examples = make_sample(scale=0.01).examples
    lists = examples[(examples["small_version"] == 1) & (examples["split"] == "test")]
    parts, first = [], 0
    for locale, number in (("us", 8_956), ("es", 2_417), ("jp", 3_123)):
        own = lists[lists["product_locale"] == locale]
        codes = pd.factorize(own["query_id"])[0]
        times = -(-number // (codes.max() + 1))
        copy = np.repeat(np.arange(times), len(own)) * (codes.max() + 1) + np.tile(codes, times)
        part = pd.DataFrame({"query_id": first + copy, "query": np.tile(own["query"], times), "query_locale": locale,
                             "product_id": np.tile(own["product_id"], times)})
        parts.append(part[copy < number].assign(query=lambda rows: rows["query"] + " " + rows["query_id"].astype(str)))
        first += number
    v03 = pd.concat(parts, ignore_index=True)
    v03.to_csv(tmp_path / "test_public-v0.3.csv.zip", index=False)
    candidates = read_candidates(tmp_path / "test_public-v0.3.csv.zip")
    assert candidates["query_id"].nunique() == 14_496 and 250_000 < len(candidates) < 400_000
    probs = candidates.assign(**dict(zip(PROB_COLUMNS, np.random.default_rng(0).dirichlet(np.ones(4), len(candidates)).T)))
    path = write_submission(probs, tmp_path / "submission.csv")
    counts = check_submission(path, candidates, ranking_score(probs))
    assert counts["rows"] == len(candidates) and counts["queries"] == 14_496 and counts["interleaved_queries"] == 0
    whole = path.read_text()
    path.write_text(whole[:whole.rindex("\n", 0, -1) + 1])
    with pytest.raises(InputError, match=f"lacks 1 of {len(candidates)} candidates"):
        check_submission(path, candidates)


@pytest.mark.parametrize("score, part", [([.9, .8, .7, .6, .5], None), ([.9, .9, .9, .1, .1], None),
                                         ([.1, .2, .3, .6, .5], "does not rank best first in 2 row.s. of 1 queries")])
def test_order_is_checked_where_scores_are_given(tmp_path, probs, score, part):
    path = write_submission(probs, tmp_path / "submission.csv")
    if part is None:
        assert check_submission(path, probs, np.array(score))["rows"] == 5
    else:
        with pytest.raises(InputError, match=part):
            check_submission(path, probs, np.array(score))


def put(folder: Path, name: str, **columns) -> None:
    pd.DataFrame(columns).to_csv(folder / name, index=False)


PAIR = {"query": ["a"], "query_locale": ["us"], "product_id": ["1"]}
CATALOGUE = {"product_id": ["1"], "product_title": ["x"], "product_locale": ["us"]}


def test_files_are_found_by_their_columns(tmp_path):
    (tmp_path / "deep").mkdir()
    put(tmp_path, "train-v0.3.csv", **PAIR, esci_label=["exact"])
    put(tmp_path, "sample_submission.csv", product_id=["1"], query_id=[1])
    put(tmp_path / "deep", "to_rank.csv", **PAIR)
    put(tmp_path / "deep", "things.csv", **CATALOGUE)
    (tmp_path / "notes.txt").write_text("not a table")
    lists, catalogues = find_attached(tmp_path)
    assert lists.name == "to_rank.csv" and [path.name for path in catalogues] == ["things.csv"]
    put(tmp_path, "test_private.csv", **PAIR)
    with pytest.raises(InputError, match="holds 2 files with test lists"):
        find_attached(tmp_path)
    assert find_attached(tmp_path, "*private*")[0].name == "test_private.csv"
    lists, catalogues = find_attached(tmp_path, "*private*", "catalogue*")
    with pytest.raises(InputError, match="No catalogue can be read"):
        products_of(read_candidates(lists), catalogues)
    with pytest.raises(InputError, match="There is no folder"):
        find_attached(tmp_path / "nowhere")


def test_a_file_without_test_lists_is_refused(tmp_path, tiny_files):
    examples = pd.read_parquet(tiny_files / "shopping_queries_dataset_examples.parquet")
    assert len(read_candidates(tiny_files / "shopping_queries_dataset_examples.parquet")) == (
        (examples["split"] == "test") & (examples["small_version"] == 1)).sum()
    examples[examples["split"] == "train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="holds no list to rank"):
        read_candidates(tmp_path / "train.parquet")
