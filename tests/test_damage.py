"""What is damaged is found when it is opened: files of finished folders, checkpoints, token stores; and numbers that are none go nowhere."""
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertModel

from esci_nb.contract import LABELS, PROB_COLUMNS, InputError
from esci_nb.files import atomic, check_unchanged, find_flaw, is_done, mark_done, read_json, seal, write_json, write_table
from esci_nb.folders import DataFolder, open_data, probability_table, read_predictions, read_run, save_data, start_run
from esci_nb.hub import load_tokenizer
from esci_nb.metrics import Interval, bootstrap_interval, headroom, paired_bootstrap, summarise_scores
from esci_nb.model import engines
from esci_nb.model.cross_encoder import CrossEncoder, load_model, save_model
from esci_nb.model.encode import tokenize_texts
from esci_nb.model.engines import Engine, NoFiniteNumbers, SafePredictor
from esci_nb.rank.judge import fit_gathered
from esci_nb.rank.members import Gathered, collect, made_up_members
from esci_nb.recipe import make_run
from esci_nb.strategy.base import Strategies, Strategy, TrainingRows
from esci_nb.strategy.distill import read_labels
from esci_nb.train import fit as fit_module
from esci_nb.train import trainer as trainer_module
from esci_nb.train.fit import fit, predict
from esci_nb.train.room import checkpoints_in, last_checkpoint, step_of
from esci_nb.train.trainer import CheckpointedTrainer, Progress


def damages(path):
    "A file emptied, cut, removed and with one bit flipped, one after the other; as it was at the end."
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:middle], None, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        yield
        path.write_bytes(whole)


# Files

@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "device"])
def test_only_files_are_replaced(kind, tmp_path):
    place, outside = tmp_path / "place", tmp_path / "outside"
    outside.write_text("mine")
    if kind == "folder":
        place.mkdir()
    elif kind == "device":
        place = type(place)("/dev/null")
    else:
        place.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(InputError, match="not replaced by a file"), atomic(place) as partial:
        partial.write_text("ours")
    assert outside.read_text() == "mine" and not list(tmp_path.glob(".*part")) and not (tmp_path / "nowhere").exists()


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda one, other: (order.append("replace"), replace(one, other)))
    write_json({}, tmp_path / "a.json")
    assert order == ["fsync", "replace", "fsync"]


def test_json_has_no_nan(tmp_path):
    write_json({"a": float("nan"), "b": [np.float64("inf"), 1.5], "c": {"d": (float("-inf"),)}}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [None]}}


def test_every_file_of_a_finished_folder_is_checked(tmp_path):
    names = ("config.json", "oof.parquet", "model/head.json", "model/deep/weights")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    for unlisted in (".hidden", "LOCK", "notebook.ipynb"):
        (tmp_path / unlisted).write_text("a")
    assert find_flaw(tmp_path) is None
    mark_done(tmp_path)
    (tmp_path / "report.html").write_text("comes later")
    for unlisted in (".hidden", "LOCK", "notebook.ipynb"):
        (tmp_path / unlisted).unlink()
    check_unchanged(tmp_path)
    for name in names:
        for _ in damages(tmp_path / name):
            for asked in (tmp_path, tmp_path / name):
                if len(asked.relative_to(tmp_path).parts) <= 2:
                    with pytest.raises(InputError, match=f"{name} is missing or broken.*delete the folder {tmp_path.name} "):
                        check_unchanged(asked)
    check_unchanged(tmp_path)


def test_a_damaged_marker_is_no_empty_one(tmp_path):
    write_json({"a": 1}, tmp_path / "a.json")
    (tmp_path / "DONE").touch()
    assert is_done(tmp_path) and read_json(tmp_path / "a.json") == {"a": 1}, "finished before files were listed"
    for text in ("{", '{"files": []}', '{"files": {"a.json": 3}}', "[]", "\udcff"):
        (tmp_path / "DONE").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match="DONE is broken"):
            read_json(tmp_path / "a.json")


def test_no_advice_to_remove_what_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "oof.parquet").write_text("{")
    for read in (lambda: read_json(tmp_path / "config.json"), lambda: read_predictions(tmp_path, "oof"), lambda: read_predictions(tmp_path, "test")):
        with pytest.raises(InputError) as said:
            read()
        assert "delete" not in str(said.value)


def test_the_runner_does_not_leave_it_to_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCI_NB_RUNNER", "1")
    mark_done(tmp_path)
    assert not is_done(tmp_path)
    seal(tmp_path)
    assert is_done(tmp_path)


def tiny_rows(n=6):
    return pd.DataFrame({"example_id": range(n), "query_id": [i // 2 for i in range(n)], "product_id": list("abcdef")[:n], "product_locale": "us",
                         "esci_label": (list(LABELS) * 2)[:n], "split": "train", "fold": [i // 2 % 3 for i in range(n)], "source": "task1"})


def test_finished_folders_are_refused_when_damaged(toy, tmp_path):
    rows, model = tiny_rows(), CrossEncoder(BertModel.from_pretrained(toy["run"]["backbone"], add_pooling_layer=False))
    save_data(tmp_path / "data" / "tiny-0a1b2c3d", rows, rows[["product_id", "product_locale"]], {"n_folds": 3, "source": "tiny"})
    seal(tmp_path / "data" / "tiny-0a1b2c3d")
    data = open_data(tmp_path / "data" / "tiny-0a1b2c3d")
    run = start_run(make_run(data=data.name, **toy["run"]), data, tmp_path)
    write_table(probability_table(rows, data.held_out(0), np.full((2, len(LABELS)), 1 / len(LABELS))), run / "oof.parquet")
    save_model(model, run / "model", toy["tokenizer"])
    seal(run)
    write_table(probability_table(rows, data.held_out(0), np.full((2, len(LABELS)), 1 / len(LABELS))), run / "test.parquet")
    seal(run)
    (run / "test.parquet").rename(run / "away")
    with pytest.raises(InputError, match="test.parquet is missing or broken: it is gone"):
        collect([run])
    (run / "away").rename(run / "test.parquet")
    readers = {data.path: lambda: open_data(data.path), run / "config.json": lambda: read_run(run), run / "oof.parquet": lambda: read_predictions(run, "oof"),
               run / "model": lambda: load_model(run / "model")}
    for place, read in readers.items():
        read()
        for path in sorted(place.glob("*")) if place.is_dir() else [place]:
            if path.name != "DONE":
                for _ in damages(path):
                    with pytest.raises(InputError, match="missing or broken"):
                        read()
    for _ in damages(run / "model" / "tokenizer.json"):
        with pytest.raises(InputError, match="tokenizer.json is missing or broken"):
            load_tokenizer(str(run / "model"))
    for read in readers.values():
        read()


# Token stores

def test_damaged_tokens_are_made_again(toy, tmp_path, capsys):
    texts = ["w1 w2 w3", "", "w4"]
    expected = np.array(tokenize_texts(toy["tokenizer"], texts, tmp_path / "s").ids)
    assert tokenize_texts(None, texts, tmp_path / "s").ids.tolist() == expected.tolist(), "opened, not made again"
    assert not capsys.readouterr().out
    for name in ("ids.bin", "offsets.npy", "DONE"):
        for _ in damages(tmp_path / "s" / name):
            assert tokenize_texts(toy["tokenizer"], texts, tmp_path / "s").ids.tolist() == expected.tolist()
            assert "are made again" in capsys.readouterr().out
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "ids.bin").write_bytes(b"half")
    assert tokenize_texts(toy["tokenizer"], texts, tmp_path / "half").ids.tolist() == expected.tolist()
    assert "never finished" in capsys.readouterr().out and not (tmp_path / "half" / "LOCK").exists()


def test_one_process_tokenises_and_the_others_wait(toy, tmp_path):
    code = f"""
import time
from esci_nb.hub import load_tokenizer
import esci_nb.model.encode as encode
write = encode._write_store
def slow(*values):
    print("tokenises", flush=True)
    time.sleep(1)
    write(*values)
encode._write_store = slow
print(len(encode.tokenize_texts(load_tokenizer({toy["run"]["backbone"]!r}), ["w1 w2", "w3"], {str(tmp_path / "s")!r})), flush=True)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes) and sum("tokenises" in text for text in said) == 1, said
    assert all(text.splitlines()[-1] == "2" for text in said) and find_flaw(tmp_path / "s") == ""


# Checkpoints

class Killed(Exception):
    "What ends a training before its end."


def save_at(*steps, die):
    "A callback that asks for checkpoints after some steps and dies in another."
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in steps
        if state.global_step == die:
            raise Killed
        return control
    return on_step_end


@pytest.fixture(params=[False, True], ids=["at once", "behind"])
def killed(toy, tmp_path, monkeypatch, request):
    "A run that was killed with two checkpoints, and the weights of one that was not."
    monkeypatch.setattr(CheckpointedTrainer, "behind", request.param)
    run = make_run(ema=0.9, rdrop=1.0, batch_rows=32, **toy["run"])
    whole = fit(run, toy["pairs"], toy["rows"], tmp_path / "whole").model.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", save_at(1, 3, 5, die=6))
        with pytest.raises(Killed):
            fit(run, toy["pairs"], toy["rows"], tmp_path / "killed")
    return run, whole, tmp_path / "killed"


def test_a_damaged_checkpoint_does_not_count(toy, killed, tmp_path):
    run, whole, folder = killed
    newest, before = checkpoints_in(folder / "checkpoints")
    assert (step_of(newest), step_of(before)) == (5, 3), "two are kept, no more"
    files = sorted(newest.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "strategies.safetensors", "DONE"} <= {
        path.name for path in files}
    for path in files:
        for _ in damages(path):
            assert last_checkpoint(folder / "checkpoints") == before
    for name in ("optimizer.pt", "DONE"):
        resumed = tmp_path / name
        shutil.copytree(folder, resumed)
        (resumed / "checkpoints" / newest.name / name).unlink()
        assert all(torch.equal(whole[key], value) for key, value in fit(run, toy["pairs"], toy["rows"], resumed).model.state_dict().items())
    (newest / "DONE").unlink()
    (before / "rng_state.pth").write_bytes(b"")
    assert last_checkpoint(folder / "checkpoints") is None
    assert all(torch.equal(whole[key], value) for key, value in fit(run, toy["pairs"], toy["rows"], folder).model.state_dict().items())


def test_a_damaged_checkpoint_makes_room_for_the_next(toy, killed, monkeypatch):
    run, _, folder = killed
    (folder / "checkpoints" / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    (folder / "checkpoints" / "checkpoint-mine").mkdir()
    monkeypatch.setattr(Progress, "on_step_end", save_at(5, 7, die=8))
    with pytest.raises(Killed):
        fit(run, toy["pairs"], toy["rows"], folder)
    assert [step_of(path) for path in checkpoints_in(folder / "checkpoints")] == [7, 5] and step_of(last_checkpoint(folder / "checkpoints")) == 7
    assert (folder / "checkpoints" / "checkpoint-mine").is_dir()


def test_the_training_goes_on_while_a_checkpoint_is_written(toy, tmp_path, monkeypatch):
    began, go_on, order, finish = threading.Event(), threading.Event(), [], trainer_module._finish

    def slow(folder, parts):
        began.set()
        assert go_on.wait(60)
        order.append(folder.name)
        return finish(folder, parts)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in (1, 4)
        if state.global_step == 3:
            assert began.is_set() and last_checkpoint(tmp_path / "checkpoints") is None
            order.append("step 3")
            go_on.set()
        return control
    monkeypatch.setattr(CheckpointedTrainer, "behind", True)
    monkeypatch.setattr(trainer_module, "_finish", slow)
    monkeypatch.setattr(Progress, "on_step_end", on_step_end)
    fit(make_run(batch_rows=32, **toy["run"]), toy["pairs"], toy["rows"], tmp_path)
    assert order == ["step 3", "checkpoint-1", "checkpoint-4"] and step_of(last_checkpoint(tmp_path / "checkpoints")) == 4


def test_what_goes_wrong_behind_the_training_is_raised_in_it(toy, tmp_path, monkeypatch):
    def full(*values):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(CheckpointedTrainer, "behind", True)
    monkeypatch.setattr(trainer_module, "save_state", full)
    monkeypatch.setattr(Progress, "on_step_end", save_at(2, 4, die=8))
    with pytest.raises(OSError, match="No space"):
        fit(make_run(batch_rows=32, **toy["run"]), toy["pairs"], toy["rows"], tmp_path)
    assert last_checkpoint(tmp_path / "checkpoints") is None


# Numbers that are none

class Broken(Strategy):
    "From one step on, a loss that is no number, a gradient that is none, or a weight that is none."
    def __init__(self, what, step):
        self.what, self.step_of_it, self.steps = what, step, 0

    def start(self, training):
        self.model = training.model

    def loss(self, plain, forward):
        self.steps += 1
        if self.steps < self.step_of_it or self.what == "weight":
            return plain()
        if self.what == "loss":
            return plain() * float("nan")
        return plain() + (forward.logits.sum() * 0).sqrt()  # finite, its gradient is not

    def after_step(self):
        if self.what == "weight" and self.steps >= self.step_of_it:
            self.model.head.bias.data[0] = float("inf")


@pytest.mark.parametrize("what, step, named", [("loss", 3, 3), ("gradient", 3, 3), ("weight", 3, 3), ("weight", 8, 8), ("gradient", 8, 8)])
def test_a_loss_that_is_no_number_stops_the_run(what, step, named, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "on_step_end", save_at(*range(1, 8), die=-1))
    run = make_run(batch_rows=32, **toy["run"])
    with pytest.raises(InputError, match=rf"no finite number in step {named} of 8; lower lr \(now 0.001\)\.$"):
        fit(run, toy["pairs"], toy["rows"], tmp_path, Strategies([Broken(what, step)]))
    for checkpoint in checkpoints_in(tmp_path / "checkpoints"):
        assert step_of(checkpoint) < named


def test_the_step_is_named_though_it_is_looked_at_later(toy, tmp_path, monkeypatch):
    plain = fit_module._arguments
    monkeypatch.setattr(fit_module, "_arguments", lambda *values: (arguments := plain(*values), setattr(arguments, "logging_steps", 8))[0])
    with pytest.raises(InputError, match="in step 2 of 8"):
        fit(make_run(batch_rows=32, **toy["run"]), toy["pairs"], toy["rows"], tmp_path, Strategies([Broken("loss", 2)]))


def test_memory_that_runs_out_is_a_sentence(toy, tmp_path):
    class Greedy(Strategy):
        def loss(self, plain, forward):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    with pytest.raises(InputError, match=r"lower batch_tokens \(now \d+\) or set gradient_checkpointing=true"):
        fit(make_run(**toy["run"]), toy["pairs"], toy["rows"], tmp_path, Strategies([Greedy()]))
    with pytest.raises(InputError, match=r"lower batch_tokens \(now \d+\)\.$"):
        fit(make_run(gradient_checkpointing=True, **toy["run"]), toy["pairs"], toy["rows"], tmp_path, Strategies([Greedy()]))


def test_no_rows_no_training(toy, tmp_path):
    rows = TrainingRows(np.array([], int), toy["rows"].target, toy["rows"].weight)
    with pytest.raises(InputError, match="no rows to train on"):
        fit(make_run(**toy["run"]), toy["pairs"], rows, tmp_path)


def overflowing(toy, factor):
    torch.manual_seed(0)  # its head
    model = CrossEncoder(BertModel.from_pretrained(toy["run"]["backbone"], add_pooling_layer=False), dropout=0.0).eval()
    layer = model.backbone.encoder.layer[0]
    with torch.no_grad():
        for weight in (*layer.intermediate.dense.parameters(), *layer.output.dense.parameters()):
            weight.mul_(factor)
    return model


def test_half_precision_has_one_way_to_predict(toy, monkeypatch):
    monkeypatch.setattr(engines, "pick_engine", lambda device=None: Engine(torch.device("cpu")))  # fp16 stays fp16 on it
    model, rows = overflowing(toy, 1e4), np.arange(40)
    exact = predict(model, toy["pairs"], rows, "fp32")
    for precision in ("fp16", "bf16"):
        found = predict(model, toy["pairs"], rows, precision)
        assert np.isfinite(found).all() and (precision == "bf16" or np.allclose(found, exact, atol=2e-4))
    already_half = overflowing(toy, 1e4)
    already_half.backbone.to(torch.float16)
    assert np.allclose(predict(already_half, toy["pairs"], rows, "fp16"), exact, atol=0.05)
    with pytest.raises(InputError, match="no finite numbers, not even in fp32"):
        predict(overflowing(toy, float("nan")), toy["pairs"], rows, "fp16")


def test_a_batch_that_does_not_fit_is_halved_in_training_too(toy, monkeypatch):
    model, rows, sizes = overflowing(toy, 1.0), np.arange(64), []
    exact, plain = predict(model, toy["pairs"], rows), Engine.probabilities

    def narrow(self, model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, batch)

    monkeypatch.setattr(engines.CpuEngine, "probabilities", narrow)
    assert np.allclose(predict(model, toy["pairs"], rows), exact, atol=1e-6) and max(sizes) == 64 and sizes[-1] <= 20
    monkeypatch.setattr(engines.CpuEngine, "probabilities", lambda *values: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(InputError, match="Memory ran out in the prediction"):
        predict(model, toy["pairs"], rows)


def test_safe_predictor_says_when_nothing_helps(toy):
    nothing = lambda batch: np.full((len(batch["input_ids"]), len(LABELS)), np.nan, np.float32)
    with pytest.raises(NoFiniteNumbers):
        SafePredictor(nothing, toy["pairs"], in_fp32=lambda: nothing)(np.arange(3))


def test_tables_without_numbers_are_neither_written_nor_read(tmp_path):
    rows = tiny_rows()
    good = probability_table(rows, np.arange(6), np.full((6, len(LABELS)), 1 / len(LABELS)))
    with pytest.raises(InputError, match="no finite probabilities for 6 us rows"):
        probability_table(rows, np.arange(6), np.full((6, len(LABELS)), np.nan))
    write_json({"data": "x-0a1b2c3d", "locales": [], "folds": [0]}, tmp_path / "config.json")
    (tmp_path / "DONE").touch()
    write_table(good.assign(fold=0, **{PROB_COLUMNS[0]: np.nan}), tmp_path / "soft.parquet")
    with pytest.raises(InputError, match="soft.parquet: 6 of 6 rows are no probabilities"):
        read_labels(tmp_path, "soft", "distill", DataFolder(tmp_path / "x-0a1b2c3d", rows, rows, {}), 0)
    for wrong in (np.nan, np.inf, 7.0):
        write_table(good.assign(**{PROB_COLUMNS[0]: wrong}), tmp_path / "oof.parquet")
        with pytest.raises(InputError, match="oof.parquet: 6 of 6 rows are no probabilities"):
            read_predictions(tmp_path, "oof")
    for score in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="leaderboard score of poor is"):
            fit_gathered(gathered(), "winners", {"poor": score})


# Scores that are missing

def gathered(label=None, is_list=True, members=("twin 1", "poor")):
    some = made_up_members(n_lists=6).named(list(members))
    rows = some.rows if label is None else some.rows.assign(esci_label=label)
    some = type(some)(some.names, rows, some.probabilities, some.scores, some.is_scorer)
    return Gathered(some, None, np.full(len(rows), is_list), {})


def test_nothing_to_average_is_no_error():
    none = pd.Series([np.nan, np.nan], index=[1, 2])
    assert bootstrap_interval(none).n == 0 and np.isnan(bootstrap_interval(none).mean) and isinstance(bootstrap_interval(none), Interval)
    paired = paired_bootstrap(none, none)
    assert paired.n == 0 and np.isnan([paired.delta, paired.low, paired.high, paired.p]).all()
    assert np.isnan(headroom(1.0, 1.0)) and headroom(pd.Series([1.0, 0.5]), pd.Series([1.0, 0.0])).isna().tolist() == [True, False]


@pytest.mark.parametrize("change, reason", [
    ({"esci_label": LABELS[-1]}, "no product of 3 ranked lists has a gain"), ({"esci_label": ""}, "no labelled ranked lists"),
    ({"source": "pairs"}, "no labelled ranked lists"), ({"esci_label": LABELS[0]}, None), ({}, None)])
def test_a_missing_score_says_why(change, reason):
    rows = tiny_rows().assign(**change)
    table = probability_table(rows, np.arange(6), np.full((6, len(LABELS)), 1 / len(LABELS)))
    scores = summarise_scores(rows, table)
    assert scores.get("missing") == reason and (scores["lists"] == 0) == np.isnan(scores["ndcg"]) == np.isnan(scores["random"]) == (reason is not None)


def test_a_mean_needs_no_lists_and_other_methods_say_so():
    for without in (gathered(is_list=False), gathered(LABELS[-1])):
        assert not without.can_be_judged
        assert np.isfinite(fit_gathered(without, "mean").predict(without.oof)).all()
        for method in ("winners", "simplex", "single"):
            with pytest.raises(InputError, match="the method mean"):
                fit_gathered(without, method)
    assert gathered().can_be_judged
