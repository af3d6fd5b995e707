"""Soft and pseudo labels: nobody labels a query that it saw, whatever the folders hold."""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from esci_nb.contract import LABELS, LOCALES, PROB_COLUMNS, InputError
from esci_nb.data.folds import make_folds
from esci_nb.data.merge import merge_tasks
from esci_nb.data.sample import make_sample
from esci_nb.files import write_json, write_table
from esci_nb.folders import DataFolder, probability_table
from esci_nb.recipe import make_run
from esci_nb.strategy import distill
from esci_nb.strategy.distill import (N_TEACHERS, Teacher, check_unseen, distilled_targets, query_keys, read_soft_labels, read_teachers,
                                      soft_labels, teacher_folds, teacher_split)
from esci_nb.strategy.pseudo import passing, pseudo_predictions, pseudo_targets, read_pseudo_labels, select_pseudo, unlabelled_rows

STUDENTS = (-1, 0, 1, 2)


def refused(call, *arguments) -> str:
    "The message of the refusal: one sentence."
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 500
    return message


def twice_in_disguise(rows: pd.DataFrame) -> pd.DataFrame:
    "`rows`, and every fifth train query once more under another number, spelled in another way."
    chosen = rows["query_id"].drop_duplicates().iloc[::5]
    twins = rows[rows["query_id"].isin(chosen) & (rows["split"] == "train")].copy()
    twins["query_id"] += 1_000_000
    twins["example_id"] += 10_000_000
    twins["query"] = "\u3000" + twins["query"].str.upper().str.replace(" ", "  ")
    return pd.concat([rows, twins], ignore_index=True)


@pytest.fixture(scope="module", params=["train", "ranked"])
def data(request) -> DataFolder:
    "Folds over the train split (with a test split), or over all ranked lists (without one); some queries have twins."
    rows = twice_in_disguise(merge_tasks(make_sample(0.0012).examples))
    folded = make_folds(rows, 3, 7, request.param)
    return DataFolder(Path(f"tiny-{request.param}"), folded, pd.DataFrame(), {"n_folds": 3})


@pytest.fixture(scope="module", autouse=True)
def cut_once():
    "The teacher folds of the two data folders are cut once for all tests here."
    known = {}

    def remember(rows: pd.DataFrame, n: int = N_TEACHERS) -> np.ndarray:
        if id(rows) not in known:
            known[id(rows)] = rows, teacher_folds(rows, n)
        return known[id(rows)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "teacher_folds", remember)
        yield


@pytest.fixture(scope="module")
def probs(data) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(len(LABELS), 0.4), len(data.rows)).astype("float32")


def finished_run(folder: Path, data: DataFolder, probs: np.ndarray, fold: int, teacher: int = -1, **fields) -> Path:
    "What a finished run leaves, without training anything."
    run = folder / f"run-f{fold}-t{teacher}"
    train, inner = (data.train(fold), None) if teacher < 0 else teacher_split(data, fold, teacher)
    for part, positions in (("oof", data.held_out(fold)), ("test", data.test), ("inner", inner)):
        if positions is not None and len(positions):
            write_table(probability_table(data.rows, positions, probs[positions]), run / f"{part}.parquet")
    values = {"backbone": "b", "seed": 1, "lr": 0.1} | fields
    write_json(make_run(data=data.name, fold=fold, teacher=teacher, **values).values() | {"n_folds": 3}, run / "config.json")
    write_json({"train_rows": len(train)}, run / "metrics.json")
    (run / "DONE").touch()
    return run


def bag(folder: Path, data: DataFolder, probs: np.ndarray, fold: int, **fields) -> list[Path]:
    return [finished_run(folder, data, probs, fold, teacher, **fields) for teacher in range(N_TEACHERS)]


# Who may teach whom

@pytest.mark.parametrize("student", STUDENTS)
def test_no_teacher_shares_a_query_with_what_it_labels(data, student):
    by_id, by_text = query_keys(data.rows)
    labelled = []
    for teacher in range(N_TEACHERS):
        trained, inner = teacher_split(data, student, teacher)
        assert len(trained) and len(inner)
        for key in (by_id, by_text):
            assert not set(key[trained]) & set(key[inner])
            assert not set(key[trained]) & set(key[data.held_out(student)])
        assert not np.isin(trained, data.test).any()
        labelled.append(inner)
    assert np.sort(np.concatenate(labelled)).tolist() == data.train(student).tolist()


def test_there_are_twins_and_they_stay_together(data):
    by_id, by_text = query_keys(data.rows)
    folds = teacher_folds(data.rows)
    train = folds >= 0
    assert len(set(by_text[train])) < len(set(by_id[train]))
    assert (pd.Series(folds[train]).groupby(by_text[train]).nunique() == 1).all()
    assert (train == (data.rows["split"] == "train")).all()


def test_teacher_folds_are_always_the_same_and_do_not_look_at_labels(data):
    folds = teacher_folds(data.rows)
    assert (folds == teacher_folds(data.rows.assign(esci_label=""))).all()
    assert (folds == teacher_folds(data.rows.copy())).all()
    assert (folds != teacher_folds(data.rows, seed=1)).any()
    # every teacher fold has its part of every fold and locale
    cells = pd.crosstab([data.rows["fold"], data.rows["product_locale"]], folds).drop(columns=-1, errors="ignore")
    assert list(cells) == [0, 1, 2] and (cells.sum() / cells.sum().sum()).between(0.25, 0.42).all()


def test_the_same_words_in_another_locale_are_another_query():
    rows = pd.DataFrame({"query": "ipad", "query_id": [1, 1, 2, 2], "product_locale": ["us", "us", "es", "es"]})
    check_unseen(rows, {"t": [0, 1]}, {"t": [2, 3]})
    # ... unless they carry the same number, which the loader would have refused
    assert "1 of the queries" in refused(check_unseen, rows.assign(query_id=1), {"t": [0, 1]}, {"t": [2, 3]})


@pytest.mark.parametrize("text", ["IPAD  Case", " ipad case ", "ｉｐａｄ case", "ipad\u3000case"])
def test_check_unseen_knows_a_text_in_disguise(text):
    rows = pd.DataFrame({"query": ["ipad case", text], "query_id": [1, 2], "product_locale": "us"})
    assert f"it labels, such as 2 ({text!r})" in refused(check_unseen, rows, {"t": [0]}, {"t": [1]})
    assert "scored on" in refused(check_unseen, rows, {"t": [0]}, {"t": []}, [1])


def test_a_text_in_two_folds_is_refused(data):
    rows = data.rows.copy()
    first = rows.index[rows["fold"] == 0][0]
    rows.loc[first, "fold"] = 1
    assert "more than one fold" in refused(teacher_folds, rows)


def test_wrong_numbers_of_teachers(data):
    assert "Teacher 3" in refused(teacher_split, data, 0, 3)
    assert "Teacher -1" in refused(teacher_split, data, 0, -1)
    refused(teacher_folds, data.rows, 1)


# From run folders to soft labels

@pytest.mark.parametrize("student", STUDENTS)
def test_soft_labels_of_a_bag(tmp_path, data, probs, student):
    runs = bag(tmp_path, data, probs, student)
    bags = read_teachers(runs[::-1], data)
    assert list(bags) == [student]
    train = data.train(student)
    table = soft_labels(bags[student], data.rows, train, data.held_out(student))
    assert table["example_id"].tolist() == data.rows["example_id"].iloc[train].tolist()
    np.testing.assert_array_equal(table[list(PROB_COLUMNS)].to_numpy(), probs[train])


def test_the_first_round_teaches_the_final_student_only(tmp_path, data, probs):
    runs = [finished_run(tmp_path, data, probs, fold) for fold in range(3)]
    bags = read_teachers(runs, data)
    assert list(bags) == [-1]
    if data.rows["split"].eq("test").any():
        assert len(soft_labels(bags[-1], data.rows, data.train(-1))) == len(data.train(-1))
    else:  # single pairs were never held out
        assert "no soft label" in refused(soft_labels, bags[-1], data.rows, data.train(-1))
    # the winners' cheap scheme for a student that is scored on fold 0
    assert "scored on" in refused(soft_labels, bags[-1], data.rows, data.train(0), data.held_out(0))
    assert "needs [0, 1, 2]" in refused(read_teachers, runs[:2], data)


def test_bags_that_are_refused(tmp_path, data, probs):
    runs = bag(tmp_path / "a", data, probs, 0)
    assert "No runs" in refused(read_teachers, [], data)
    assert "needs [0, 1, 2]" in refused(read_teachers, runs[:2], data)
    assert "[0, 0, 1, 2]" in refused(read_teachers, [*runs, runs[0]], data)
    assert "give one kind" in refused(read_teachers, [*runs, finished_run(tmp_path / "b", data, probs, 0)], data)
    other = finished_run(tmp_path / "c", data, probs, 0, 2, lr=0.2)
    assert "differ in lr (0.2 and 0.1)" in refused(read_teachers, [*runs[:2], other], data)
    student = bag(tmp_path / "d", data, probs, 0, soft_labels="soft-x")
    assert "itself trained with soft labels" in refused(read_teachers, student, data)
    student = bag(tmp_path / "e", data, probs, 0, pseudo_labels="pseudo-x")
    assert "itself trained with pseudo labels" in refused(read_teachers, student, data)
    elsewhere = DataFolder(Path("other"), data.rows, data.products, data.info)
    assert "not on other" in refused(read_teachers, runs, elsewhere)
    (runs[1] / "DONE").unlink()
    assert "no DONE file" in refused(read_teachers, runs, data)


def test_a_run_that_ignored_its_teacher_number_is_caught(tmp_path, data, probs):
    runs = bag(tmp_path, data, probs, 0)
    write_json({"train_rows": len(data.train(0))}, runs[0] / "metrics.json")
    assert "may leak" in refused(read_teachers, runs, data)


def test_missing_and_broken_tables(tmp_path, data, probs):
    runs = bag(tmp_path, data, probs, 0)
    (runs[0] / "inner.parquet").write_bytes(b"PAR1 cut")
    assert "inner.parquet is missing or broken" in refused(read_teachers, runs, data)
    (runs[0] / "inner.parquet").unlink()
    assert "inner.parquet is missing or broken" in refused(read_teachers, runs, data)


def test_soft_labels_that_are_refused(data, probs):
    train, held_out = data.train(0), data.held_out(0)
    splits = [teacher_split(data, 0, j) for j in range(N_TEACHERS)]
    good = [Teacher(f"t{j}", trained, probability_table(data.rows, inner, probs[inner]))
            for j, (trained, inner) in enumerate(splits)]

    def with_labels(labels: pd.DataFrame) -> list[Teacher]:
        return [Teacher("t0", good[0].trained, labels), *good[1:]]

    def message(teachers, wanted=train) -> str:
        return refused(soft_labels, teachers, data.rows, wanted, held_out)

    labels = good[0].labels
    assert "no soft label" in message(with_labels(labels.iloc[1:]))
    assert "more than one" in message(with_labels(pd.concat([labels, labels.iloc[:1]])))
    assert "does not hold" in message(with_labels(labels.assign(example_id=-1)))
    assert "does not hold" in message(with_labels(labels.assign(product_id="x")))
    assert "does not hold" in message(with_labels(labels.assign(query_id=labels["query_id"] + 1)))
    assert "no probabilities" in message(with_labels(labels.assign(p_E=2.0)))
    assert "lacks the column(s) p_I" in message(with_labels(labels.drop(columns="p_I")))
    assert "same name" in message([good[0], *good[:2]])
    assert "no train rows of the student" in message(good, train[1:])
    assert "it labels" in message([Teacher("t0", train, labels), *good[1:]])
    assert "scored on" in message([Teacher("t0", np.append(good[0].trained, held_out[0]), labels), *good[1:]])


def test_targets_mix():
    hard, soft = np.eye(4, dtype="float32"), np.full((4, 4), 0.25, "float32")
    np.testing.assert_allclose(distilled_targets(hard, soft), 0.7 * hard + 0.075, rtol=1e-6)
    np.testing.assert_array_equal(distilled_targets(hard, soft, 0.0), hard)
    np.testing.assert_array_equal(distilled_targets(hard, soft, 1.0), soft)
    assert distilled_targets(hard, soft).dtype == np.float32
    assert "same rows" in refused(distilled_targets, hard, soft[:3])
    assert "share" in refused(distilled_targets, hard, soft, 3)


def written(folder: Path, name: str, data: DataFolder, tables: dict[int, pd.DataFrame]) -> Path:
    "A folder as the stages distill and pseudo_label write it."
    write_table(pd.concat([table.assign(fold=fold) for fold, table in tables.items()]), folder / f"{name}.parquet")
    write_json({"data": data.name, "folds": sorted(tables)}, folder / "config.json")
    (folder / "DONE").touch()
    return folder


def test_a_student_reads_the_labels_of_its_own_fold(tmp_path, data, probs):
    tables = {student: soft_labels(read_teachers(bag(tmp_path, data, probs, student), data)[student], data.rows,
                                   data.train(student), data.held_out(student)) for student in (0, 1)}
    shuffled = {fold: table.sample(frac=1, random_state=0) for fold, table in tables.items()}
    folder = written(tmp_path / "soft", "soft", data, shuffled)
    for student in (0, 1):
        np.testing.assert_array_equal(read_soft_labels(folder, data, student), probs[data.train(student)])
    assert "not for 2" in refused(read_soft_labels, folder, data, 2)
    assert "not for -1" in refused(read_soft_labels, folder, data, -1)
    other = DataFolder(Path("other"), data.rows, data.products, data.info)
    assert "not for other" in refused(read_soft_labels, folder, other, 0)
    cut = written(tmp_path / "cut", "soft", data, {0: tables[0].iloc[1:]})
    assert "does not hold each" in refused(read_soft_labels, cut, data, 0)
    (folder / "DONE").unlink()
    assert "no DONE file" in refused(read_soft_labels, folder, data, 0)


# Pseudo labels

def test_pseudo_labels_come_from_models_that_never_saw_the_list(tmp_path, data, probs):
    others = 0.5 * probs + 0.125
    first = [finished_run(tmp_path / "first", data, probs, fold) for fold in range(3)]
    runs = first + bag(tmp_path / "bag", data, others, 0)
    tables = pseudo_predictions(runs, data)
    has_test = len(data.test) > 0
    assert list(tables) == ([-1, 0, 1, 2] if has_test else [0, 1, 2])
    for student, table in tables.items():
        rows = unlabelled_rows(data, student)
        assert table["example_id"].tolist() == sorted(data.rows["example_id"].iloc[rows])
        mean = {-1: (probs + others) / 2, 0: (probs + 3 * others) / 4}.get(student, probs)
        order = rows[np.argsort(data.rows["example_id"].to_numpy()[rows])]
        np.testing.assert_allclose(table[list(PROB_COLUMNS)], mean[order], atol=1e-6)
        by_text = query_keys(data.rows)[1]
        assert not set(by_text[rows]) & set(by_text[data.train(student)])


def test_pseudo_predictions_that_are_refused(tmp_path, data, probs):
    run = finished_run(tmp_path, data, probs, 0)
    assert "given twice" in refused(pseudo_predictions, [run, run], data)
    second = finished_run(tmp_path / "p", data, probs, 0, pseudo_labels="x")
    assert "would repeat them" in refused(pseudo_predictions, [second], data)
    if not len(data.test):
        assert "no test rows" in refused(pseudo_predictions, [finished_run(tmp_path / "all", data, probs, -1)], data)
    part = "test" if len(data.test) else "oof"
    table = pd.read_parquet(run / f"{part}.parquet")
    write_table(table.iloc[1:], run / f"{part}.parquet")
    assert "unlabelled rows" in refused(pseudo_predictions, [run], data)


def test_reading_pseudo_labels(tmp_path, data, probs):
    tables = pseudo_predictions([finished_run(tmp_path, data, probs, fold) for fold in (0, 1)], data)
    chosen = {fold: table.iloc[select_pseudo(table)] for fold, table in tables.items()}
    folder = written(tmp_path / "pseudo", "pseudo", data, chosen)
    for fold in chosen:
        positions, targets = read_pseudo_labels(folder, data, fold)
        assert 0 < len(positions) < len(tables[fold]) and (targets.max(1) > 0.7).all()
        np.testing.assert_array_equal(targets, probs[positions])
        assert not np.isin(positions, data.train(fold)).any()
    wiped = DataFolder(data.path, data.rows.assign(esci_label="I"), data.products, data.info)
    np.testing.assert_array_equal(read_pseudo_labels(folder, wiped, 0)[1], read_pseudo_labels(folder, data, 0)[1])
    assert "not for 2" in refused(read_pseudo_labels, folder, data, 2)
    own_rows = probability_table(data.rows, data.train(0)[:3], probs[data.train(0)[:3]])
    own = written(tmp_path / "own", "pseudo", data, {0: own_rows})
    assert "no unlabelled rows" in refused(read_pseudo_labels, own, data, 0)
    doubled = pd.concat([chosen[0], chosen[0].iloc[:1]])
    assert "twice" in refused(read_pseudo_labels, written(tmp_path / "twice", "pseudo", data, {0: doubled}), data, 0)


def test_pseudo_targets_are_distributions(probs):
    table = pd.DataFrame(probs, columns=PROB_COLUMNS)
    soft, hard = pseudo_targets(table), pseudo_targets(table, hard=True)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    assert ((hard == 1).sum(1) == 1).all() and (hard.argmax(1) == soft.argmax(1)).all()


def teach_with_any_contract() -> None:
    "From made-up judgements to soft and pseudo labels, with whatever classes and locales the contract has."
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(60), 6)
    rows = pd.DataFrame({"example_id": np.arange(360), "query_id": query, "query": [f"word {number}" for number in query],
                         "product_id": [f"P{number}" for number in range(360)], "product_locale": np.array(LOCALES)[query % len(LOCALES)],
                         "esci_label": rng.choice(LABELS, 360), "split": np.where(query % 5, "train", "test"),
                         "source": np.where(query % 3, "task1", "task2"), "weight": 1.0})
    data = DataFolder(Path("other-1"), make_folds(rows, 3), pd.DataFrame(), {"n_folds": 3})
    probs = rng.dirichlet(np.full(len(LABELS), 0.2), len(rows)).astype("float32")
    runs = bag(Path(tempfile.mkdtemp()), data, probs, 0)
    table = soft_labels(read_teachers(runs, data)[0], data.rows, data.train(0), data.held_out(0))
    np.testing.assert_array_equal(table[list(PROB_COLUMNS)], probs[data.train(0)])
    predicted = pseudo_predictions(runs, data)[-1]
    chosen = predicted.iloc[select_pseudo(predicted)]
    assert 0 < len(chosen) and pseudo_targets(chosen, hard=True).shape == (len(chosen), len(LABELS))
    assert set(passing(predicted)["locale"]) == set(LOCALES) and set(passing(predicted)["label"]) == set(LABELS)


def test_any_labels_and_locales():
    "Three classes and the locale fr, each one record in the contract, pass through both strategies; so does the contract as it is."
    from test_eda import OTHER_CONTRACT
    teach_with_any_contract()
    script = OTHER_CONTRACT + f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_distill; test_distill.teach_with_any_contract()"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
