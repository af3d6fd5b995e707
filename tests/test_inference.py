"""Inference under a budget: what is dropped, what is written, and what happens when memory, a model or a process fails."""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from esci_nb import inference
from esci_nb.contract import InputError
from esci_nb.ship.inference import (Budget, Encoder, Pass, WeightedMean, by_strength, cut_slices, load_member, rank_lists, run_members,
                                    run_processes, that_fit)
from esci_nb.model.cross_encoder import CrossEncoder
from esci_nb.ship.package import Member, open_package
from esci_nb.contract import PROB_COLUMNS
from esci_nb.rank.submission import read_candidates
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


class Pretended:
    "A model whose batches move the clock; `late` makes it slower after so many batches."

    def __init__(self, watch, pairs, rate, late=(10**9, 1)):
        self.watch, self.pairs, self.rate, self.late, self.calls = watch, pairs, rate, late, 0

    def probabilities(self, batch):
        self.calls += 1
        rate = self.rate * (self.late[1] if self.calls > self.late[0] else 1)
        self.watch.now += rate * len(batch["row"]) * self.pairs.lengths[batch["row"]].max()
        good = (batch["row"] % 7 + 1) / 8
        return np.stack([good, 1 - good, 0 * good, 0 * good], 1).astype(np.float32)


ROWS = pd.DataFrame({"query_id": np.repeat(np.arange(100), 20), "product_locale": np.repeat(["us", "es"], [1200, 800])})
PAIRS = Lengths(np.random.default_rng(1).integers(10, 60, len(ROWS)))


def member(name: str, cv: float | None, work: int = 100, locales=("us", "es")) -> Member:
    return Member(name, Path(name), {}, dict.fromkeys(locales, 1.0), cv, work, {}, {})


def run(seconds: float, members: list[Member], late=None):
    "Run pretended members on a pretended clock; the mean, the states by name, what was said, and the time that it took."
    watch, said = Watch(), []

    def load(one: Member) -> Pretended:
        return Pretended(watch, PAIRS, one.work * 1e-6, *([late[one.name]] if late and one.name in late else []))
    mean, stories = run_members(members, ROWS, lambda one: PAIRS, load, Budget(seconds, watch), batch_tokens=1000, say=said.append)
    return mean, {story.model: story.state for story in stories}, said, watch.now


def test_weakest_goes_first():
    members = [member("weak", 0.80), member("strong", 0.90), member("unknown", None), member("middle", 0.85)]
    needed = run(1e9, members)[3]
    for share, used in ((1.2, 4), (0.8, 3), (0.6, 2), (0.3, 1)):
        mean, states, said, spent = run(share * needed, members)
        assert [states[name] for name in ("strong", "middle", "weak", "unknown")] == ["used"] * used + ["dropped"] * (4 - used)
        assert mean.covered.all() and spent <= share * needed
        assert used == 4 or ("to be dropped" in said[0] and "unknown" in said[0])


def test_estimate_holds():
    _, _, said, spent = run(1e9, [member("only", 0.9)])
    promised = float(said[0].split("pairs/s, ")[1].split(" s to go")[0])
    assert 0.5 * spent < promised < spent


def test_a_model_that_slows_down_is_stopped_in_time_and_counts_where_it_was_whole():
    needed = run(1e9, [member("strong", 0.9)])[3]
    mean, states, _, spent = run(needed * 1.5, [member("strong", 0.9)], late={"strong": (40, 10)})
    assert states == {"strong": "part"} and spent < needed * 1.5 + 1.1  # a second is one slow batch
    by_query = pd.Series(mean.covered).groupby(ROWS["query_id"])
    assert 0.05 < mean.covered.mean() < 0.95 and (by_query.all() == by_query.any()).all()


def test_every_locale_gets_a_model_before_any_gets_a_second():
    members = [member("us1", 0.95, locales=("us",)), member("us2", 0.94, locales=("us",)), member("all", 0.80)]
    assert [one.name for one in by_strength(members, {"us": 1200, "es": 800})] == ["all", "us1", "us2"]
    assert [one.name for one in by_strength(members, {"us": 1200})] == ["us1", "us2", "all"]
    assert [one.name for one in by_strength([*members, member("jp", 0.99, locales=("jp",))], {"us": 1})] == ["us1", "us2", "all"]
    needed = run(1e9, [members[2]])[3]
    mean, states, _, _ = run(needed * 1.1, members)
    assert states["all"] == "used" and mean.covered.all()


def test_a_small_model_stands_in_for_a_large_one_that_does_not_fit():
    small = run(1e9, [member("small", 0.7, 10)])[3]
    mean, states, _, _ = run(small * 5, [member("large", 0.9, 1000), member("small", 0.7, 10)])
    assert states == {"large": "dropped", "small": "used"} and mean.covered.all()
    assert that_fit([], 1) == [] and that_fit([2, 1, 1], 2) == [0] and that_fit([3, 1, 1], 2) == [1, 2]


def test_slices_are_whole_queries():
    positions = np.flatnonzero(ROWS["product_locale"] == "es")
    slices = cut_slices(ROWS, positions)
    assert np.concatenate(slices).tolist() == positions.tolist() and len(slices) == 1
    first, second, *_ = cut_slices(ROWS, np.arange(len(ROWS)))
    assert not set(ROWS["query_id"].iloc[first]) & set(ROWS["query_id"].iloc[second])


def test_mean_weighs_by_locale_and_ignores_queries_that_were_not_finished():
    rows = pd.DataFrame({"query_id": [1, 1, 2, 2], "product_locale": ["us", "us", "es", "es"]})
    first, second = np.tile([0.8, 0.2, 0, 0], (4, 1)), np.tile([0.2, 0.8, 0, 0], (4, 1))
    second[3] = np.nan
    mean = WeightedMean(rows)
    assert mean.add({"us": 1.0, "es": 1.0}, first) == 4 and mean.add({"us": 3.0, "es": 9.0}, second) == 2
    assert np.allclose(mean.probabilities()[:, 0], [0.35, 0.35, 0.8, 0.8])


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


def test_out_of_memory_halves_the_batch_and_changes_nothing(attached, plain, tmp_path, monkeypatch):
    asked, true = [], CrossEncoder.probabilities

    def short_of_memory(self, batch):
        asked.append(len(batch["input_ids"]))
        if asked[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return true(self, batch)
    monkeypatch.setattr(CrossEncoder, "probabilities", short_of_memory)
    again = rank(attached, tmp_path / "submission.csv", say=lambda line: None)
    assert max(asked) > 20 and np.allclose(again.rows[list(PROB_COLUMNS)], plain.rows[list(PROB_COLUMNS)], atol=1e-6)
    assert again.stories["note"].str.contains("halved").all() and sum(size > 20 for size in asked) <= 8, "it learns the size"


def test_one_broken_model_costs_only_itself(attached, plain, tmp_path, monkeypatch):
    true = CrossEncoder.probabilities

    def broken(self, batch):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return true(self, batch)

    def load(one):
        model = load_member(one)
        model.broken = one.name == "english"
        return model
    monkeypatch.setattr(CrossEncoder, "probabilities", broken)
    monkeypatch.setattr(inference, "load_member", load)
    said = []
    again = rank(attached, tmp_path / "submission.csv", say=said.append)
    assert dict(zip(again.stories["model"], again.stories["state"])) == {"all": "used", "english": "failed"}
    assert any("illegal memory access" in line for line in said) and again.rows["p_E"].notna().all()
    us = again.rows["product_locale"] == "us"
    assert np.allclose(again.rows.loc[~us, "p_E"], plain.rows.loc[~us, "p_E"]) and not np.allclose(again.rows.loc[us, "p_E"], plain.rows.loc[us, "p_E"])


def test_numbers_that_overflow_are_computed_again_in_fp32(attached, tmp_path):
    one = open_package(attached / "package").members[0]
    model = load_member(one)
    true, seen = model.probabilities, []

    def overflowing(batch):
        seen.append(next(model.backbone.parameters()).dtype)
        return true(batch) if seen[-1] == torch.float32 else np.full((len(batch["row"]), 4), np.nan, np.float32)
    model.probabilities = overflowing
    model.backbone.to(torch.float16)
    files = sorted((attached / "data").glob("*.zip"))
    rows = read_candidates(files[1]).head(40)
    pairs = Encoder(rows, inference.products_of(rows, files[:1]), tmp_path)(one)
    single = Pass(model, pairs, [np.arange(len(rows))], Watch())
    single.finish(Budget(1e9, Watch()))
    assert seen[0] == torch.float16 and seen[-1] == torch.float32 and np.isfinite(single.probs).all()


def test_two_processes_say_what_one_says(attached, plain, tmp_path):
    said = []
    again = rank(attached, tmp_path / "submission.csv", processes=2, say=said.append)
    assert (tmp_path / "submission.csv").read_bytes() == plain.path.read_bytes()
    assert np.allclose(again.rows[list(PROB_COLUMNS)], plain.rows[list(PROB_COLUMNS)], atol=1e-5)
    assert {line[:3] for line in said if "pairs/s" in line} == {"[0]", "[1]"} and len(again.stories) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]


def test_processes_that_die_leave_the_rows_to_others(attached, tmp_path, monkeypatch):
    files = sorted((attached / "data").glob("*.zip"))
    rows = read_candidates(files[1])
    monkeypatch.setattr(sys, "executable", "false")
    said = []
    probs, stories = run_processes(open_package(attached / "package"), rows, inference.products_of(rows, files[:1]), Budget(60), 2,
                                   tmp_path, say=said.append)
    assert np.isnan(probs).all() and stories == [] and sum("ended with code 1" in line for line in said) == 2


def test_products_without_a_catalogue_entry_are_ranked_all_the_same(attached, tmp_path):
    files = sorted((attached / "data").glob("*.zip"))
    rows = read_candidates(files[1])
    strange = pd.concat([rows, rows.head(1).assign(product_id="B0NEW", example_id=10**6)], ignore_index=True)
    said = []
    ranking = rank_lists(open_package(attached / "package"), strange, files[:1], tmp_path / "s.csv", 300, say=said.append)
    assert ranking.counts["rows"] == len(strange) and any("B0NEW" in line for line in said)


def test_a_locale_without_a_model_is_refused_before_anything_is_written(attached, tmp_path):
    package = open_package(attached / "package")
    only_us = type(package)(package.folder, package.version, tuple(one for one in package.members if one.name == "english"))
    files = sorted((attached / "data").glob("*.zip"))
    with pytest.raises(InputError, match="covers the locale"):
        rank_lists(only_us, read_candidates(files[1]), files[:1], tmp_path / "s.csv", 300)
    assert not list(tmp_path.iterdir())
