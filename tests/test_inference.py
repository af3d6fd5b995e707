"""Inference under a budget: what is dropped, what is written, and what happens when memory, a model or a process fails."""
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from esci_nb.contract import LABELS, PROB_COLUMNS, InputError
from esci_nb.data.read import read_products
from esci_nb.rank.members import align
from esci_nb.rank.methods import METHODS, find_method
from esci_nb.rank.submission import check_submission, read_candidates
from esci_nb.recipe import Recipe
from esci_nb.ship import inference
from esci_nb.ship.clock import Budget, cut_slices
from esci_nb.ship.inference import Combination, PairCache, Predictor, load_predictor, products_of, rank_lists, read_lists, run_processes
from esci_nb.ship.package import PackedModel, open_package
from esci_nb.ship.schedule import Answers, ModelRace, by_strength, run_models, that_fit
from packing import competition_files, pack_tiny


class Watch:
    "A clock that is moved by hand."
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Lengths:
    "Pairs that are nothing but lengths."

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, positions):
        return {"row": np.asarray(positions)}


def pretended(watch, pairs, rate, late=(10**9, 1)):
    "A model whose batches move the clock; `late` makes it slower after so many batches."
    calls = []

    def predict(batch):
        calls.append(len(batch["row"]))
        factor = late[1] if len(calls) > late[0] else 1
        watch.now += rate * factor * len(batch["row"]) * pairs.lengths[batch["row"]].max()
        probs = np.zeros((len(batch["row"]), len(LABELS)), np.float32)
        probs[:, 0] = (batch["row"] % 7 + 1) / 8
        probs[:, 1] = 1 - probs[:, 0]
        return probs
    return predict


ROWS = pd.DataFrame({"query_id": np.repeat(np.arange(100), 20), "product_locale": np.repeat(["us", "es"], [1200, 800])})
PAIRS = Lengths(np.random.default_rng(1).integers(10, 60, len(ROWS)))


def packed_model(name: str, cv: float | None, work: int = 100, locales=("us", "es"), member: str = "") -> PackedModel:
    return PackedModel(name, member or name, Path(name), {}, dict.fromkeys(locales, 1.0), cv, work, Recipe(), {})


def run(seconds: float, models: list[PackedModel], late=None):
    "Run pretended models on a pretended clock; the answers, the states by name, what was said, and the time that it took."
    watch, said = Watch(), []

    def load(model: PackedModel, precision: str):
        return pretended(watch, PAIRS, model.work * 1e-6, *([late[model.name]] if late and model.name in late else []))
    race = ModelRace(models, ROWS, lambda model: PAIRS, load, Budget(seconds, watch), batch_tokens=1000, say=said.append)
    outcomes = run_models(race)
    return race.answers, {outcome.model: outcome.state for outcome in outcomes}, said, watch.now


def test_weakest_goes_first():
    models = [packed_model("weak", 0.80), packed_model("strong", 0.90), packed_model("unknown", None), packed_model("middle", 0.85)]
    needed = run(1e9, models)[3]
    for share, used in ((1.2, 4), (0.8, 3), (0.6, 2), (0.3, 1)):
        answers, states, said, spent = run(share * needed, models)
        assert [states[name] for name in ("strong", "middle", "weak", "unknown")] == ["used"] * used + ["dropped"] * (4 - used)
        assert answers.is_answered.all() and spent <= share * needed
        assert used == 4 or ("to be dropped" in said[0] and "unknown" in said[0])


def test_estimate_holds():
    _, _, said, spent = run(1e9, [packed_model("only", 0.9)])
    promised = float(said[0].split("pairs/s, ")[1].split(" s to go")[0])
    assert 0.5 * spent < promised < spent


def test_a_model_that_slows_down_is_stopped_in_time_and_counts_where_it_was_whole():
    needed = run(1e9, [packed_model("strong", 0.9)])[3]
    answers, states, _, spent = run(needed * 1.5, [packed_model("strong", 0.9)], late={"strong": (40, 10)})
    assert states == {"strong": "part"} and spent < needed * 1.5 + 1.1  # a second is one slow batch
    by_query = pd.Series(answers.is_answered).groupby(ROWS["query_id"])
    assert 0.05 < answers.is_answered.mean() < 0.95 and (by_query.all() == by_query.any()).all()


def test_every_locale_gets_a_model_before_any_gets_a_second():
    models = [packed_model("us1", 0.95, locales=("us",)), packed_model("us2", 0.94, locales=("us",)), packed_model("all", 0.80)]
    assert [one.name for one in by_strength(models, {"us": 1200, "es": 800})] == ["all", "us1", "us2"]
    assert [one.name for one in by_strength(models, {"us": 1200})] == ["us1", "us2", "all"]
    assert [one.name for one in by_strength([*models, packed_model("jp", 0.99, locales=("jp",))], {"us": 1})] == ["us1", "us2", "all"]
    needed = run(1e9, [models[2]])[3]
    answers, states, _, _ = run(needed * 1.1, models)
    assert states["all"] == "used" and answers.is_answered.all()


def test_a_small_model_stands_in_for_a_large_one_that_does_not_fit():
    small = run(1e9, [packed_model("small", 0.7, 10)])[3]
    answers, states, _, _ = run(small * 5, [packed_model("large", 0.9, 1000), packed_model("small", 0.7, 10)])
    assert states == {"large": "dropped", "small": "used"} and answers.is_answered.all()
    assert that_fit([], 1) == [] and that_fit([2, 1, 1], 2) == [0] and that_fit([3, 1, 1], 2) == [1, 2]


def test_slices_are_whole_queries():
    positions = np.flatnonzero(ROWS["product_locale"] == "es")
    slices = cut_slices(ROWS, positions)
    assert np.concatenate(slices).tolist() == positions.tolist() and len(slices) == 1
    first, second, *_ = cut_slices(ROWS, np.arange(len(ROWS)))
    assert not set(ROWS["query_id"].iloc[first]) & set(ROWS["query_id"].iloc[second])


def certain(shares) -> np.ndarray:
    "Probabilities of the first class, and the rest for the second."
    probs = np.zeros((len(shares), len(LABELS)))
    probs[:, 0], probs[:, 1] = shares, 1 - np.asarray(shares)
    return probs


def test_members_are_means_of_their_models_and_ignore_queries_that_were_not_finished():
    rows = pd.DataFrame({"query_id": [1, 1, 2, 2], "product_locale": ["us", "us", "es", "es"]})
    models = [packed_model("a-f0", 0.8, member="a"), packed_model("a-f1", 0.8, member="a"), packed_model("b", 0.8)]
    answers = Answers(rows, models)
    assert answers.add(models[0], certain([0.8] * 4)) == 4 and answers.add(models[1], certain([0.4, 0.4, 0.4, np.nan])) == 2
    assert np.allclose(answers.of("a")[:, 0], [0.6, 0.6, 0.8, 0.8]) and not answers.is_complete.any()
    assert answers.add(models[2], certain([0.2, 0.2, np.nan, np.nan])) == 2 and answers.is_complete.tolist() == [True, True, False, False]
    assert np.allclose(answers.mean()[:, 0], [0.4, 0.4, 0.8, 0.8])


@pytest.fixture(scope="module")
def attached(tmp_path_factory) -> Path:
    "Test files and a package of two tiny models, one for us alone."
    folder = tmp_path_factory.mktemp("attached")
    catalogue = competition_files(folder / "data")
    pack_tiny(folder / "package", catalogue["product_title"], {"all": (0.80, ("us", "es", "jp")), "english": (0.82, ("us",))})
    return folder


def rank(attached: Path, path: Path, seconds: float = 300, **options):
    files = sorted((attached / "data").glob("*.zip"))
    return rank_lists(open_package(attached / "package"), read_candidates(files[1]), files[:1], path, seconds, **options)


@pytest.fixture(scope="module")
def plain(attached, tmp_path_factory):
    "The ranking when nothing goes wrong."
    return rank(attached, tmp_path_factory.mktemp("plain") / "submission.csv", say=lambda line: None)


def loading(change):
    "`load_predictor`, whose predictions go through `change(model, batch, predict)`."
    def load(model, precision=""):
        predict = load_predictor(model, precision)
        return lambda batch: change(model, batch, predict)
    return load


def test_out_of_memory_halves_the_batch_and_changes_nothing(attached, plain, tmp_path, monkeypatch):
    asked = []

    def short_of_memory(model, batch, predict):
        asked.append(len(batch["input_ids"]))
        if asked[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return predict(batch)
    monkeypatch.setattr(inference, "load_predictor", loading(short_of_memory))
    again = rank(attached, tmp_path / "submission.csv", say=lambda line: None)
    assert max(asked) > 20 and np.allclose(again.rows[list(PROB_COLUMNS)], plain.rows[list(PROB_COLUMNS)], atol=1e-6)
    assert again.outcomes["note"].str.contains("halved").all() and sum(size > 20 for size in asked) <= 8, "it learns the size"


def test_one_broken_model_costs_only_itself(attached, plain, tmp_path, monkeypatch):
    def broken(model, batch, predict):
        if model.name == "english":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return predict(batch)
    monkeypatch.setattr(inference, "load_predictor", loading(broken))
    said = []
    again = rank(attached, tmp_path / "submission.csv", say=said.append)
    assert dict(zip(again.outcomes["model"], again.outcomes["state"])) == {"all": "used", "english": "failed"}
    assert any("illegal memory access" in line for line in said) and again.rows["p_E"].notna().all()
    us = again.rows["product_locale"] == "us"
    assert np.allclose(again.rows.loc[~us, "p_E"], plain.rows.loc[~us, "p_E"])
    assert not np.allclose(again.rows.loc[us, "p_E"], plain.rows.loc[us, "p_E"])


def test_numbers_that_overflow_are_computed_again_in_fp32(attached, plain, tmp_path, monkeypatch):
    asked = []

    def load(model, precision=""):
        asked.append((model.name, precision))
        predict = load_predictor(model, precision)
        return predict if precision == "fp32" else lambda batch: np.full((len(batch["row"]), len(LABELS)), np.nan, np.float32)
    monkeypatch.setattr(inference, "load_predictor", load)
    again = rank(attached, tmp_path / "submission.csv", say=lambda line: None)
    assert sorted(asked) == [("all", ""), ("all", "fp32"), ("english", ""), ("english", "fp32")], "loaded again once"
    assert set(again.outcomes["state"]) == {"used"} and np.allclose(again.rows["p_E"], plain.rows["p_E"], atol=1e-6)


def test_two_processes_say_what_one_says(attached, plain, tmp_path):
    said = []
    again = rank(attached, tmp_path / "submission.csv", processes=2, say=said.append)
    assert (tmp_path / "submission.csv").read_bytes() == plain.path.read_bytes()
    assert np.allclose(again.rows[list(PROB_COLUMNS)], plain.rows[list(PROB_COLUMNS)], atol=1e-5)
    assert {line[:3] for line in said if "pairs/s" in line} == {"[0]", "[1]"} and len(again.outcomes) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]


def test_processes_that_die_leave_the_rows_to_others(attached, tmp_path, monkeypatch):
    files = sorted((attached / "data").glob("*.zip"))
    rows = read_candidates(files[1])
    monkeypatch.setattr(sys, "executable", "false")
    said = []
    answers, outcomes = run_processes(open_package(attached / "package"), rows, products_of(rows, files[:1]), Budget(60), 2,
                                      tmp_path, say=said.append)
    assert not answers.is_answered.any() and outcomes == [] and sum("ended with code 1" in line for line in said) == 2


def test_products_without_a_catalogue_entry_are_ranked_all_the_same(attached, tmp_path):
    files = sorted((attached / "data").glob("*.zip"))
    rows = read_candidates(files[1])
    strange = pd.concat([rows, rows.head(1).assign(product_id="B0NEW", example_id=10**6)], ignore_index=True)
    said = []
    ranking = rank_lists(open_package(attached / "package"), strange, files[:1], tmp_path / "s.csv", 300, say=said.append)
    assert ranking.counts["rows"] == len(strange) and any("B0NEW" in line for line in said)


def test_a_locale_without_a_model_is_refused_before_anything_is_written(attached, tmp_path):
    package = open_package(attached / "package")
    only_us = dataclasses.replace(package, models=tuple(model for model in package.models if model.name == "english"))
    files = sorted((attached / "data").glob("*.zip"))
    with pytest.raises(InputError, match="covers the locale"):
        rank_lists(only_us, read_candidates(files[1]), files[:1], tmp_path / "s.csv", 300)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def labelled(plain) -> pd.DataFrame:
    "The rows of the lists with made-up labels."
    rng = np.random.default_rng(0)
    n = len(plain.rows)
    return plain.rows.drop(columns=[*PROB_COLUMNS, "score"]).assign(esci_label=rng.choice(LABELS, n), lexical=rng.random(n), text="phone case")


def with_method(attached, tmp_path, labelled, method: str):
    "The package of the same two models with a method that was fitted on what they say, and the method."
    rng, us = np.random.default_rng(1), labelled["product_locale"] == "us"
    tables = {name: labelled.loc[rows, ["example_id"]].assign(**dict(zip(PROB_COLUMNS, rng.dirichlet(np.ones(len(LABELS)), rows.sum()).T)))
              for name, rows in (("all", us | True), ("english", us))}
    fitted = find_method(method).fit(align(labelled, tables))
    (tmp_path / "ensemble").mkdir()
    fitted.save(tmp_path / "ensemble")
    titles = pd.read_csv(next(attached.glob("data/*catalogue*")))["product_title"].fillna("")
    pack_tiny(tmp_path / "package", titles, {"all": (0.80, ("us", "es", "jp")), "english": (0.82, ("us",))}, tmp_path / "ensemble")
    return open_package(tmp_path / "package"), fitted


def answers_of(attached, package, rows, folder) -> tuple[Answers, PairCache]:
    "What the models of a package say about the rows, with ample time."
    products = products_of(rows, sorted((attached / "data").glob("*catalogue*")))
    cache = PairCache(rows, products, folder)
    race = ModelRace(package.models, rows, cache, load_predictor, Budget(300), say=lambda line: None)
    run_models(race)
    return race.answers, cache


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_method_is_applied_to_what_its_members_say(attached, tmp_path, labelled, method):
    from esci_nb.rank.members import with_lexical
    package, fitted = with_method(attached, tmp_path, labelled, method)
    rows = read_candidates(next((attached / "data").glob("test*")))
    answers, cache = answers_of(attached, package, rows, tmp_path / "tokens")
    prepared = cache.prepare(package.models[0])
    tables = {name: rows[["example_id"]].assign(**dict(zip(PROB_COLUMNS, answers.of(name).T))).dropna() for name in ("all", "english")}
    members = align(with_lexical(rows.assign(query=prepared.rows["query"]), prepared.products), tables)
    expected = members.table(fitted.predict(members)).set_index("example_id").loc[rows["example_id"], list(PROB_COLUMNS)]
    files = sorted((attached / "data").glob("*.zip"))
    ranking = rank_lists(package, rows, files[:1], tmp_path / "s.csv", 300, say=lambda line: None)
    assert np.allclose(ranking.rows[list(PROB_COLUMNS)], expected, atol=1e-6)
    assert method != "stacking" or not np.allclose(expected, answers.mean(), atol=1e-3)


@pytest.mark.parametrize("method", ["mean", "stacking"])
def test_a_missing_member_is_made_up_for(attached, tmp_path, labelled, method, monkeypatch):
    package, _ = with_method(attached, tmp_path, labelled, method)
    rows = read_candidates(next((attached / "data").glob("test*")))
    answers, cache = answers_of(attached, package, rows, tmp_path / "tokens")
    combine = Combination(package, rows, lambda: cache.prepare(package.models[0]))
    alone, us = Answers(rows, package.models), (rows["product_locale"] == "us").to_numpy()
    alone.add(package.models[0], answers.of("all"))
    assert np.allclose(combine(alone)[us], answers.of("all")[us]), "weights are scaled up, stacking falls back to the mean"
    assert np.allclose(combine(alone)[~us], combine(answers)[~us]), "the other locales miss nobody"
    assert np.isnan(combine(Answers(rows, package.models))).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_without_a_model_that_was_left_out(attached, tmp_path, labelled, method):
    package, _ = with_method(attached, tmp_path, labelled, method)
    whole = tuple(model for model in package.models if model.name == "all")
    rest = dataclasses.replace(package, models=whole, is_lenient=True)
    rows, said = read_candidates(next((attached / "data").glob("test*"))), []
    ranking = rank_lists(rest, rows, sorted((attached / "data").glob("*catalogue*")), tmp_path / "s.csv", 300, say=said.append)
    assert ranking.rows["p_E"].notna().all() and ranking.counts["rows"] == len(rows)


def test_a_method_of_other_members_is_not_used(attached, tmp_path, labelled):
    package, _ = with_method(attached, tmp_path, labelled, "mean")
    rows, said = read_candidates(next((attached / "data").glob("test*"))), []
    strange = dataclasses.replace(package, models=(dataclasses.replace(package.models[0], member="stranger"),))
    assert Combination(strange, rows, None, said.append).method is None and "was not fitted with stranger" in said[0]


@pytest.mark.parametrize("change, part", [
    (lambda table: pd.concat([table, table.head(1).assign(product_locale="xx")]), "goes on"),
    (lambda table: pd.concat([table, table.head(1).assign(product_brand="other")]), "goes on"),
    (lambda table: table.assign(product_title=" "), "goes on"),
    (lambda table: table.drop(columns="product_bullet_point"), "goes on"),
])
def test_a_catalogue_with_mistakes_does_not_stop_an_inference(attached, tmp_path, change, part):
    rows, said = read_candidates(next((attached / "data").glob("test*"))), []
    table = pd.read_csv(next(attached.glob("data/*catalogue*")), dtype=str, keep_default_na=False)
    change(table).to_csv(tmp_path / "catalogue.csv", index=False)
    products = products_of(rows, [tmp_path / "catalogue.csv"], said.append)
    right = products_of(rows, sorted((attached / "data").glob("*catalogue*")), said.append)
    assert len(products) == len(right) and products["product_brand"].equals(right["product_brand"]) and part in said[0]
    with pytest.raises(InputError):
        read_products(tmp_path / "catalogue.csv")


def test_lists_with_mistakes_are_read_as_they_are(attached, tmp_path):
    table, said = pd.read_csv(next(attached.glob("data/test*")), dtype=str), []
    table.loc[0, "query_locale"] = "xx"
    table.to_csv(tmp_path / "test.csv", index=False)
    rows = read_lists(tmp_path / "test.csv", said.append)
    assert rows["query_id"].dtype == "int64" and rows["product_id"].tolist() == table["product_id"].tolist() and "'xx'" in said[0]


def test_a_predictor_without_a_package_ranks_by_bm25(attached, tmp_path, capsys):
    predictor = Predictor(tmp_path / "nothing", hours=0.01)
    predictor.prediction_setup()
    lists, catalogue = (str(next(attached.glob(f"data/{name}*"))) for name in ("test", "product"))
    predictor.predict(lists, catalogue, str(tmp_path / "out" / "s.csv"))
    assert check_submission(tmp_path / "out" / "s.csv", read_candidates(lists)) and "ranked by BM25" in capsys.readouterr().out


def test_a_method_that_fails_costs_only_itself(attached, tmp_path, labelled, monkeypatch):
    package, _ = with_method(attached, tmp_path, labelled, "stacking")
    rows, said = read_candidates(next((attached / "data").glob("test*"))), []
    answers, cache = answers_of(attached, package, rows, tmp_path / "tokens")
    combine = Combination(package, rows, lambda: cache.prepare(package.models[0]), said.append)
    monkeypatch.setattr(type(combine.method), "predict", lambda *given: 1 / 0)
    assert np.allclose(combine(answers), answers.mean()) and np.allclose(combine(answers), answers.mean())
    assert len(said) == 1 and "the method stacking cannot be used (division by zero); the plain mean is taken" in said[0]
    monkeypatch.setattr(METHODS["stacking"], "is_available", classmethod(lambda cls: False))
    assert Combination(package, rows, cache.prepare, said.append).method is None and "not installed" in said[1], "and says so at once"
