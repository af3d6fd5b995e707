"""Ensembles: no label reaches the lists it is judged on, members of one locale, scorers, the command, and refusals that list all gaps."""
import json

import numpy as np
import pandas as pd
import pytest

from esci_nb.cli import main
from esci_nb.contract import InputError
from esci_nb.rank.judge import judge, nested
from esci_nb.rank.members import align, apply_calibration, calibrate, collect, gather
from esci_nb.rank.methods import METHODS, correlation, fit_method, weighted, winner_weights
from esci_nb.folders import open_data
from esci_nb.run.stages import ensemble_path
from esci_nb.contract import PROB_COLUMNS
from esci_nb.rank.submission import check_submission

GAINS = np.array([1, 0.1, 0.01, 0])


def make_members(n_lists=40, n_rows=10, seed=0):
    "Two seeds of one recipe, another recipe, one of us lists only, and a scorer."
    rng = np.random.default_rng(seed)
    n = n_lists * n_rows
    relevance = rng.normal(size=n)
    rows = pd.DataFrame({"example_id": np.arange(n), "query_id": np.repeat(np.arange(n_lists), n_rows), "product_id": [f"p{i:04d}" for i in range(n)],
                         "product_locale": np.repeat(np.where(np.arange(n_lists) % 4 == 0, "es", "us"), n_rows),
                         "esci_label": np.array(list("ICSE"))[np.digitize(relevance, [-1, -0.7, 0.3])],
                         "lexical": relevance + 2 * rng.normal(size=n)})
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
    from esci_nb.rank.methods import split_lists
    part = split_lists(members, 4, np.random.default_rng([0, 0]))
    other = members.take(np.ones(len(part), bool))
    other.rows.loc[part == 2, "esci_label"] = np.random.default_rng(5).choice(list("ESCI"), (part == 2).sum())
    before, after = (nested(some, method, parts=4, repeats=1)[0] for some in (members, other))
    assert np.array_equal(before[part == 2], after[part == 2])
    if method not in ("single", "mean"):
        assert not np.array_equal(before[part == 1], after[part == 1]), "labels of the other parts are used"


def test_the_dealing_keeps_lists_whole(members):
    from esci_nb.rank.methods import split_lists
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
    if method != "stacking":
        for weights in fitted.weights.values():
            assert np.isclose(weights.sum(), 1) and (weights >= 0).all()


def test_a_member_of_one_locale_leaves_the_others_alone(members):
    expected = members.probabilities @ GAINS
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
    one, other = (fit_method("simplex", align(rows, some)) for some in (tables, scaled))
    assert np.allclose(one.weights[""], other.weights[""], atol=1e-6)


def test_calibration_keeps_the_order_and_is_honest(members):
    score = members.scores[:, 4]
    probabilities = apply_calibration(score, calibrate(score, members.rows["esci_label"]))
    assert (np.diff((probabilities @ GAINS)[np.argsort(score)]) >= 0).all()
    shares = pd.Series(members.rows["esci_label"]).value_counts(normalize=True).reindex(list("ESCI"))
    assert np.allclose(probabilities.mean(axis=0), shares, atol=0.01)


def test_clones_share_a_vote():
    rows, tables = make_members()
    score = winner_weights(align(rows, {name: tables[name] for name in ("a1", "b")}), temperature=1e9)
    cloned = align(rows, {"a1": tables["a1"], "clone": tables["a1"], "b": tables["b"]})
    weights = winner_weights(cloned, temperature=1e9)
    assert np.isclose(weights[0], weights[1]) and weights[2] > weights[0] and np.isclose(score[0], score[1])
    assert np.isclose(correlation(cloned)[0, 1], 1)


def test_leaderboard_scores_move_the_winners_weights(members):
    scorers = fit_method("winners", members, {"b": 0.93, "a1": 0.90, "a2": 0.90}).weights[""]
    plain = fit_method("winners", members).weights[""]
    assert scorers[2] > plain[2]
    with pytest.raises(InputError, match="'c'.*a1, a2, b, us, scorer"):
        fit_method("winners", members, {"c": 0.9})


def test_stacking_without_lightgbm_says_what_to_install(members, monkeypatch):
    monkeypatch.setattr("esci_nb.ensemble.has_lightgbm", lambda: False)
    with pytest.raises(InputError, match="esci_nb\\[stacking\\]"):
        fit_method("stacking", members)
    assert "stacking" not in set(judge(members, parts=3, repeats=1, methods=["mean", "stacking"]).table["method"])


def copy_runs(made, folder, family, change=lambda table: table, locales=("us", "es", "jp")):
    "The demo's runs as another member: the same folders with changed tables."
    runs = []
    for run in made.runs:
        copy = folder / f"{family}-{run.name}"
        copy.mkdir(parents=True)
        for name in ("oof", "test"):
            change(pd.read_parquet(run / f"{name}.parquet")).to_parquet(copy / f"{name}.parquet")
        config = json.loads((run / "config.json").read_text())
        config |= {"family": family, "locales": list(locales), "recipe": config["recipe"] | {"name": family}}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "DONE").touch()
        runs.append(copy)
    return runs


def noisy(table):
    mixed = table[list(PROB_COLUMNS)].to_numpy() + np.random.default_rng(len(table)).dirichlet(np.ones(4), len(table))
    return table.assign(**dict(zip(PROB_COLUMNS, mixed.T / 2)))


@pytest.fixture(scope="module")
def members_on_disk(made, tmp_path_factory):
    "The demo's member, a noisy one and one of us lists only."
    folder = tmp_path_factory.mktemp("members")
    return [*made.runs, *copy_runs(made, folder, "noisy", noisy),
            *copy_runs(made, folder, "english", lambda table: noisy(table)[table["product_locale"] == "us"], ("us",))]


def test_command_from_runs_and_scores_to_a_submission(made, members_on_disk, tmp_path, capsys):
    outputs = tmp_path / "outputs"
    assert main(["score", str(made.data), "bm25", str(tmp_path / "bm25.csv")]) == 0
    words = ["ensemble", *map(str, members_on_disk), "--method", "simplex", "--data", str(made.data), "--outputs", str(outputs)]
    words += ["--scores", f"bm25={tmp_path / 'bm25.csv'}", "--to", str(tmp_path / "ensemble.csv")]
    assert main(words) == 0
    folder, = (outputs / "ensembles").iterdir()
    assert capsys.readouterr().out.strip().endswith(str(folder))
    assert {path.name for path in folder.iterdir()} == {"config.json", "methods.csv", "oof.parquet", "test.parquet", "submission.csv",
                                                        "notebook.ipynb", "DONE"}
    data = open_data(made.data)
    test = pd.read_parquet(folder / "test.parquet")
    assert check_submission(folder / "submission.csv", data.rows.iloc[data.test])["rows"] == len(data.test)
    assert list(test) == ["example_id", "query_id", "product_id", "product_locale", *PROB_COLUMNS]
    assert np.allclose(test[list(PROB_COLUMNS)].sum(axis=1), 1)
    config = json.loads((folder / "config.json").read_text())
    assert len(config["weights"][""]) == 4 and np.isclose(sum(config["weights"][""].values()), 1)
    assert sorted(sum(config["members"].values(), [])) == sorted(run.name for run in members_on_disk)
    table = pd.read_csv(tmp_path / "ensemble.csv")
    assert {"method", "ndcg", "delta", "low", "high", "lists", "members", "date", "command"} <= set(table)
    assert set(METHODS) <= set(table["method"]) and (table["lists"] == table["lists"].iloc[0]).all()
    oof = pd.read_parquet(folder / "oof.parquet")
    assert sorted(oof["example_id"]) == sorted(data.rows.loc[data.rows["fold"] >= 0, "example_id"])
    before = (folder / "DONE").stat().st_mtime_ns
    assert main(words) == 0 and (folder / "DONE").stat().st_mtime_ns == before


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
    (tmp_path / "s.csv").write_text("a")
    one = ensemble_path(made.runs, "mean", scores={"s": tmp_path / "s.csv"})
    (tmp_path / "s.csv").write_text("b")
    assert len({one, ensemble_path(made.runs, "mean", scores={"s": tmp_path / "s.csv"}), ensemble_path(made.runs), ensemble_path(made.runs, "greedy"),
                ensemble_path(made.runs, "winners", leaderboard={"x": 0.9})}) == 5


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
