"""Ensembles: no label reaches the lists it is judged on, members of one locale, scorers, the command, and refusals that list all gaps."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from esci_nb.cli import main
from esci_nb.contract import LABELS, LOCALES, PAIR_KEY, PROB_COLUMNS, ROW_KEY, InputError
from esci_nb.folders import open_data
from esci_nb.rank.judge import judge, nested
from esci_nb.rank.members import align, apply_calibration, calibrate, collect, expected_gain, gather, read_scores
from esci_nb.rank.methods import METHODS, Stacking, Winners, correlation, find_method, fit_method, load_method, split_lists, weighted
from esci_nb.rank.submission import check_submission
from esci_nb.rank.untrained import scorer_id, write_scores
from esci_nb.run.stages import ensemble_path


def make_members(n_lists=40, n_rows=10, seed=0):
    "Two seeds of one recipe, another recipe, one of us lists only, and a scorer."
    rng = np.random.default_rng(seed)
    n = n_lists * n_rows
    relevance = rng.normal(size=n)
    rows = pd.DataFrame({"example_id": np.arange(n), "query_id": np.repeat(np.arange(n_lists), n_rows), "product_id": [f"p{i:04d}" for i in range(n)],
                         "product_locale": np.repeat(np.where(np.arange(n_lists) % 4 == 0, "es", "us"), n_rows),
                         "esci_label": np.array(list("ICSE"))[np.digitize(relevance, [-1, -0.7, 0.3])],
                         "lexical": relevance + 2 * rng.normal(size=n), "text": "phone case"})
    shared = rng.normal(size=n)

    def says(noise):
        exact = 1 / (1 + np.exp(-2 * (relevance + noise)))
        return rows[["example_id"]].assign(p_E=exact, p_S=(1 - exact) / 2, p_C=0.0, p_I=(1 - exact) / 2)

    tables = {"a1": says(shared + 0.3 * rng.normal(size=n)), "a2": says(shared + 0.3 * rng.normal(size=n)),
              "b": says(1.2 * rng.normal(size=n)), "us": says(rng.normal(size=n))[rows["product_locale"] == "us"],
              "scorer": rows[["example_id"]].assign(score=relevance + 1.5 * rng.normal(size=n))}
    return rows, tables


@pytest.fixture(scope="module")
def members():
    return align(*make_members())


@pytest.mark.parametrize("method", METHODS)
def test_no_label_reaches_the_lists_it_is_judged_on(members, method):
    part = split_lists(members, 4, np.random.default_rng([0, 0]))
    other = members.take(np.ones(len(part), bool))
    other.rows.loc[part == 2, "esci_label"] = np.random.default_rng(5).choice(LABELS, (part == 2).sum())
    before, after = (nested(some, method, parts=4, repeats=1)[0] for some in (members, other))
    assert np.array_equal(before[part == 2], after[part == 2])
    if method not in ("single", "mean"):
        assert not np.array_equal(before[part == 1], after[part == 1]), "labels of the other parts are used"


def test_parts_keep_lists_whole(members):
    part = split_lists(members, 5, np.random.default_rng(0))
    assert (members.rows.groupby("query_id")["product_id"].size() == 10).all()
    assert (pd.Series(part).groupby(members.lists).nunique() == 1).all()
    dealt = pd.crosstab(members.rows["product_locale"], part)
    assert (dealt.max(axis=1) - dealt.min(axis=1) <= 10).all(), "every locale in every part"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_probabilities_in_every_locale(members, method):
    fitted = fit_method(method, members)
    predicted = fitted.predict(members)
    assert np.allclose(predicted.sum(axis=1), 1) and (predicted >= 0).all()
    assert np.array_equal(predicted, fit_method(method, members).predict(members)), "deterministic"
    learned = fitted.inner["method"] if method == "chosen" else method
    assert bool(fitted.weights) == (learned not in ("stacking", "lambdamart"))
    for weights in fitted.weights.values():
        assert np.isclose(sum(weights.values()), 1) and min(weights.values()) >= 0 and list(weights) == members.names


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_kept_as_plain_text_and_read_again(members, method, tmp_path):
    fitted = fit_method(method, members, seed=3)
    fitted.save(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["method.json"]
    again = load_method(tmp_path / "new")
    assert again == fitted and again.scorers == ["scorer"] and again.importance().equals(fitted.importance())
    assert np.array_equal(again.predict(members), fitted.predict(members))
    backwards = members.named(members.names[::-1])
    assert np.allclose(again.predict(backwards), fitted.predict(members)), "members are found by name"
    some = again.predict(members.named(["us", "b"]))
    assert np.isfinite(some).all() and np.allclose(some.sum(axis=1), 1), "missing members leave their share to the others"
    (tmp_path / "new" / "method.json").write_text("{")
    with pytest.raises(InputError, match="method.json"):
        load_method(tmp_path / "new")


def test_a_member_of_one_locale_leaves_the_others_alone(members):
    expected = expected_gain(members.probabilities)
    weights = np.array([0.2, 0.2, 0.2, 0.4, 0.0])
    score = weighted(expected, members.covered, weights)
    spanish = ~members.covered[:, 3]
    assert np.allclose(score[spanish], expected[spanish][:, :3].mean(axis=1))
    assert np.allclose(score[~spanish], expected[~spanish][:, :4] @ weights[:4])
    judged = judge(members, parts=4, repeats=1, methods=["mean", "simplex"])
    assert "us" not in set(judged.table["method"]) and "b" in set(judged.table["method"])
    assert judged.table.loc[judged.table["delta"].isna(), "method"].item() in ("a1", "a2", "b")


def test_the_scale_of_a_scorer_does_not_matter():
    rows, tables = make_members()
    scaled = tables | {"scorer": tables["scorer"].assign(score=tables["scorer"]["score"] * 1000 - 7)}
    one, other = (fit_method("simplex", align(rows, some)).weights[""] for some in (tables, scaled))
    assert np.allclose(list(one.values()), list(other.values()), atol=1e-6)


def test_calibration_keeps_the_order_and_is_honest(members):
    score = members.scores[:, 4]
    probabilities = apply_calibration(score, calibrate(score, members.rows["esci_label"]))
    assert (np.diff(expected_gain(probabilities)[np.argsort(score)]) >= 0).all()
    shares = pd.Series(members.rows["esci_label"]).value_counts(normalize=True).reindex(list(LABELS))
    assert np.allclose(probabilities.mean(axis=0), shares, atol=0.01)


def test_clones_share_a_vote():
    rows, tables = make_members()
    winners = Winners(temperature=1e9)
    score = winners.rule(align(rows, {name: tables[name] for name in ("a1", "b")}))
    cloned = align(rows, {"a1": tables["a1"], "clone": tables["a1"], "b": tables["b"]})
    weights = winners.rule(cloned)
    assert np.isclose(weights[0], weights[1]) and weights[2] > weights[0] and np.isclose(score[0], score[1])
    assert np.isclose(correlation(cloned)[0, 1], 1)


def test_leaderboard_scores_move_the_winners_weights(members):
    led = fit_method("winners", members, {"b": 0.93, "a1": 0.90, "a2": 0.90}).weights[""]
    plain = fit_method("winners", members).weights[""]
    assert led["b"] > plain["b"]
    with pytest.raises(InputError, match="'c'.*a1, a2, b, us, scorer"):
        fit_method("winners", members, {"c": 0.9})


def test_stacking_without_lightgbm_says_what_to_install(members, monkeypatch):
    fitted = fit_method("stacking", members)
    monkeypatch.setattr(Stacking, "is_available", classmethod(lambda cls: False))
    for call in (find_method("stacking").fit, fitted.predict):
        with pytest.raises(InputError, match="esci_nb\\[stacking\\]"):
            call(members)
    assert "stacking" not in set(judge(members, parts=3, repeats=1, methods=["mean", "stacking"]).table["method"])


@pytest.mark.parametrize("wrong, said", [
    (lambda table: pd.concat([table, table.head(2)]), "scores 2 rows .* twice"),
    (lambda table: table.head(0), "no rows"),
    (lambda table: table.assign(score="high"), "no finite number as score of 400 rows .*'high'"),
    (lambda table: table.assign(score=np.inf), "no finite number as score of 400 rows .*inf"),
    (lambda table: table.assign(score=table["score"].where(table.index != 7)), r"no finite number as score of 1 row \(example_id 7\)"),
    (lambda table: table.assign(query_id="q" + table["query_id"].astype(str)), "query_id, is no whole number"),
    (lambda table: table.drop(columns="score"), "lacks the column 'score'"),
    (lambda table: table.drop(columns=["product_id"]), "give example_id, or query_id, product_id, product_locale"),
    (lambda table: table.head(50), "lacks 270 us rows, 80 es rows"),
])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_wrong_score_files_are_one_sentence(wrong, said, ending, tmp_path):
    rows = make_members()[0]
    path = tmp_path / f"peer.{ending}"
    table = wrong(rows[list(PAIR_KEY)].assign(score=np.random.default_rng(0).random(len(rows))))
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path, index=False)
    with pytest.raises(InputError, match=said) as caught:
        read_scores(path, rows, complete=True)
    assert "peer." in str(caught.value) and "\n" not in str(caught.value)


def test_scores_join_on_all_keys_and_ids_are_exact(tmp_path):
    "Large ids survive; a product 0123 is not 123; all keys count that both sides have, and a contradiction is refused; other rows and columns stay."
    rows = pd.DataFrame({"example_id": [2**53 + 1, 2**53 + 2, 3], "query_id": [1, 1, 2], "product_id": ["0123", "123", "NA"], "product_locale": "us"})
    full = rows.assign(score=[1.5, 0.1, 1 / 3], note="x")
    full.to_csv(tmp_path / "FULL.CSV", index=False)
    assert read_scores(tmp_path / "FULL.CSV", rows)["score"].tolist() == [1.5, 0.1, 1 / 3]
    full.assign(example_id=[2**53 + 1, 2**53 + 2, 4]).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(InputError, match=r"contradict each other in 1 row .*4 / 2 / NA / us"):
        read_scores(tmp_path / "other.csv", rows)
    full.assign(example_id=[2**53 + 1, 2**53 + 2, 4], query_id=[1, 1, 9]).to_csv(tmp_path / "more.csv", index=False)
    assert read_scores(tmp_path / "more.csv", rows)["example_id"].tolist() == [2**53 + 1, 2**53 + 2]
    full.iloc[::-1].drop(columns="example_id").to_parquet(tmp_path / "pairs.parquet")
    assert read_scores(tmp_path / "pairs.parquet", rows)["score"].tolist() == [1.5, 0.1, 1 / 3]
    full[["example_id", "score"]].astype(str).to_csv(tmp_path / "ids.csv", index=False)
    assert read_scores(tmp_path / "ids.csv", rows)["score"].tolist() == [1.5, 0.1, 1 / 3]
    full.assign(product_id=[123, 123, 5]).drop(columns="example_id").to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="column product_id, holds int64 values .* write the column as text"):
        read_scores(tmp_path / "numbers.parquet", rows)
    with pytest.raises(InputError, match="no file of scores"):
        read_scores(tmp_path / "none.csv", rows)


def test_other_classes_and_another_locale_need_one_record():
    "Three classes with gains of their own and a locale fr, set in the contract: members, methods and the judge take them as they are."
    code = """
import dataclasses
import numpy as np
import esci_nb.contract as contract
contract.LABEL_RECORDS = tuple(contract.Label(code, code, gain, gain, "#000000") for code, gain in (("yes", 3.0), ("perhaps", 1.0), ("no", 0.0)))
contract.LABELS = tuple(label.code for label in contract.LABEL_RECORDS)
contract.GAINS = {label.code: label.gain for label in contract.LABEL_RECORDS}
contract.PROB_COLUMNS = tuple(f"p_{code}" for code in contract.LABELS)
contract.LOCALE_RECORDS += (contract.Locale("fr", "French", "fr", (), True, "#111111"),)
contract.LOCALES = tuple(locale.code for locale in contract.LOCALE_RECORDS)
from esci_nb.rank.judge import judge
from esci_nb.rank.members import made_up_members
world = made_up_members(40, 10)
assert set(world.rows["product_locale"]) == {"us", "fr"} and world.probabilities.shape[2] == 3
judged = judge(world, parts=3, repeats=1)
assert {"us", "fr"} <= set(judged.table) and all(np.allclose(oof.sum(axis=1), 1) and oof.shape[1] == 3 for oof in judged.oof.values())
reached = judged.table.set_index("method")["ndcg"]
assert reached["simplex"] > reached["single"]
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr


def copy_runs(made, folder, family, change=lambda table: table, locales=LOCALES):
    "The demo's runs as another member: the same folders with changed tables."
    runs = []
    for run in made.runs:
        copy = folder / f"{family}-{run.name}"
        copy.mkdir(parents=True)
        for name in ("oof", "test"):
            change(pd.read_parquet(run / f"{name}.parquet")).to_parquet(copy / f"{name}.parquet")
        config = json.loads((run / "config.json").read_text())
        config |= {"family": family, "covers": list(locales), "name": family}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "DONE").touch()
        runs.append(copy)
    return runs


def noisy(table):
    mixed = table[list(PROB_COLUMNS)].to_numpy() + np.random.default_rng(len(table)).dirichlet(np.ones(len(PROB_COLUMNS)), len(table))
    return table.assign(**dict(zip(PROB_COLUMNS, mixed.T / 2)))


@pytest.fixture(scope="module")
def members_on_disk(made, tmp_path_factory):
    "The demo's member, a noisy one and one of us lists only."
    folder = tmp_path_factory.mktemp("members")
    return [*made.runs, *copy_runs(made, folder, "noisy", noisy),
            *copy_runs(made, folder, "english", lambda table: noisy(table)[table["product_locale"] == "us"], ("us",))]


def test_command_from_runs_and_scores_to_a_submission(made, members_on_disk, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    write_scores(open_data(made.data), "bm25", tmp_path / "bm25.csv")
    words = ["ensemble", *map(str, members_on_disk), "--method", "simplex", "--data", str(made.data), "--outputs", str(outputs)]
    words += ["--scores", f"bm25={tmp_path / 'bm25.csv'}", "--to", str(tmp_path / "ensemble.csv")]
    assert main(words) == 0
    folder, = (outputs / "ensembles").iterdir()
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert {path.name for path in folder.iterdir()} == {"config.json", "method.json", "methods.csv", "oof.parquet", "test.parquet",
                                                        "submission.csv", "tasks.csv", "task2.csv", "task3.csv", "notebook.ipynb", "DONE"}
    data = open_data(made.data)
    test = pd.read_parquet(folder / "test.parquet")
    assert check_submission(folder / "submission.csv", data.rows.iloc[data.test])["rows"] == len(data.test)
    assert list(test) == [*ROW_KEY, *PROB_COLUMNS]
    assert np.allclose(test[list(PROB_COLUMNS)].sum(axis=1), 1)
    config = json.loads((folder / "config.json").read_text())
    weights = load_method(folder).weights[""]
    assert len(weights) == 4 and np.isclose(sum(weights.values()), 1)
    assert sorted(sum(config["members"].values(), [])) == sorted(run.name for run in members_on_disk)
    table = pd.read_csv(tmp_path / "ensemble.csv")
    assert {"method", "ndcg", "delta", "low", "high", "lists", "members", "date", "command"} <= set(table)
    assert {name for name in METHODS if not METHODS[name].is_slow} <= set(table["method"]) and (table["lists"] == table["lists"].iloc[0]).all()
    oof = pd.read_parquet(folder / "oof.parquet")
    assert sorted(oof["example_id"]) == sorted(data.rows.loc[data.rows["fold"] >= 0, "example_id"])
    before = (folder / "DONE").stat().st_mtime_ns
    assert main(words) == 0 and (folder / "DONE").stat().st_mtime_ns == before


def test_bm25_by_name_is_bm25_by_file(made, tmp_path):
    data = open_data(made.data)
    write_scores(data, "bm25", tmp_path / "bm25.csv")
    by_file, by_name = (gather(made.runs, data, {"bm25": scorer}) for scorer in (tmp_path / "bm25.csv", "bm25"))
    assert np.array_equal(by_file.test.scores, by_name.test.scores, equal_nan=True) and by_name.test.is_scorer.tolist() == [False, True]
    assert np.array_equal(by_file.lists.scores, by_name.lists.scores, equal_nan=True)


def test_mean_of_the_demo_is_the_mean(made):
    runs = [pd.read_parquet(run / "test.parquet").sort_values("example_id") for run in made.runs]
    mean = np.mean([run[list(PROB_COLUMNS)].to_numpy() for run in runs], axis=0)
    assert np.allclose(pd.read_parquet(made.ensemble / "test.parquet")[list(PROB_COLUMNS)], mean, atol=1e-7)
    assert made.submission == made.ensemble / "submission.csv"


def test_all_gaps_are_said_at_once(made, members_on_disk, tmp_path):
    data = open_data(made.data)
    lost = int(pd.read_parquet(made.runs[0] / "oof.parquet")["example_id"].iloc[0])
    holed = copy_runs(made, tmp_path, "holed", lambda table: table[table["example_id"] != lost])
    blind = copy_runs(made, tmp_path, "blind", lambda table: table[table["product_locale"] != "jp"])
    with pytest.raises(InputError) as caught:
        gather([*made.runs, *holed, *blind], data)
    said = str(caught.value)
    assert "holed" in said and str(lost) in said and "blind" in said and "jp rows" in said and "test rows" in said and "\n" not in said
    with pytest.raises(InputError, match="holed.* lacks the fold.s. 1.*blind.* lacks the fold.s. 0"):
        collect([*made.runs, holed[0], blind[1]])
    data.rows.iloc[:20][["query_id", "product_id", "product_locale"]].assign(score=1.0).to_csv(tmp_path / "half.csv", index=False)
    with pytest.raises(InputError, match="half lacks .* rows"):
        gather(made.runs, data, {"half": tmp_path / "half.csv"})
    english = [run for run in members_on_disk if run.name.startswith("english")]
    with pytest.raises(InputError, match="nobody predicts .* (es|jp) rows"):
        gather(english, data)


def test_ensembles_of_other_scores_have_other_folders(made, tmp_path):
    scores = {"s": tmp_path / "s.csv"}
    (tmp_path / "s.csv").write_text("a")
    one, first = ensemble_path(made.runs, "mean", scores=scores), scorer_id(tmp_path / "s.csv")
    (tmp_path / "s.csv").write_text("other")
    assert scorer_id(tmp_path / "s.csv") != first and scorer_id("bm25") == "bm25"
    assert len({one, ensemble_path(made.runs, "mean", scores=scores), ensemble_path(made.runs, "mean", scores={"s": "bm25"}),
                ensemble_path(made.runs), ensemble_path(made.runs, "greedy"), ensemble_path(made.runs, "winners", leaderboard={"x": 0.9})}) == 6


@pytest.mark.parametrize("words, named", [
    (["--method", "best"], "best"),
    (["--scores", "bm25"], "name=file"),
    (["--scores", "bm25=/a.csv", "bm25=/b.csv"], "given twice"),
    (["--scores", "bm25=/no/such.csv"], "/no/such.csv"),
    (["--leaderboard", "baseline=high"], "high"),
    (["--data", "/no/such/data"], "/no/such/data"),
    (["--to", "TO"], "at least two members"),
])
def test_mistakes_are_one_sentence(made, words, named, tmp_path, capsys):
    words = [word.replace("TO", str(tmp_path / "to.csv")) for word in words]
    outputs = tmp_path / "outputs"
    assert main(["ensemble", *map(str, made.runs), "--outputs", str(outputs), *words]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("esci-nb: ") and named in said and "Traceback" not in said
    assert named == "at least two members" or not outputs.exists()
