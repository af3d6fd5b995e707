"""Strategies plug in: a module that is dropped into the package is found, and what a strategy remembers decides which checkpoints count."""
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from esci_nb import strategy
from esci_nb.files import seal
from esci_nb.recipe import RECIPES, make_run
from esci_nb.strategy.base import STATE_FILE, Strategies, all_strategies, load_state, save_state, state_of, strategies_of, total_cost
from esci_nb.strategy.averaging import MovingAverage
from esci_nb.train.room import last_checkpoint

MINE = '''
from esci_nb.strategy.base import Cost, Strategy


class Mine(Strategy):
    "Asked for by runs of seed 7."
    cost = Cost(step=3.0, memory=2.0)

    @classmethod
    def of(cls, run):
        return cls() if run.seed == 7 else None


class Helper(Strategy):
    "No run can ask for it."
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A copy of the package with one more module, `mine`."
    package = shutil.copytree(Path(strategy.__file__).parent, tmp_path / "strategy", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "mine.py").write_text(MINE)
    monkeypatch.setattr(strategy, "__path__", [str(package)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("esci_nb.strategy.mine", None)
    vars(strategy).pop("mine", None)


def names(strategies: Strategies) -> list[str]:
    return [type(member).__name__ for member in strategies.members]


def test_a_new_module_is_found_and_counted(mine):
    assert "Helper" not in [kind.__name__ for kind in all_strategies()]
    found = strategies_of(make_run(seed=7, dropout_branches=3, ema=0.9))
    assert names(found) == ["MovingAverage", "Mine", "MultiSampleDropout"], "in the order of the modules' names"
    assert total_cost(found).step == pytest.approx(3.06) and total_cost(found).memory == 6
    assert names(strategies_of(make_run(seed=8))) == []


def test_it_is_gone_with_its_module():
    assert "Mine" not in [kind.__name__ for kind in all_strategies()]


def test_every_strategy_is_asked_for_by_some_run():
    asked = {name for recipe in RECIPES for name in names(strategies_of(make_run(recipe, soft_labels="soft-1", pseudo_labels="pseudo-1")))}
    asked |= {*names(strategies_of(make_run(pretrained_share=0.2, stop_every=0.5)))}  # which no recipe asks for
    assert asked == {kind.__name__ for kind in all_strategies()} and names(strategies_of(make_run())) == []


PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", STATE_FILE)


def checkpoint(folder: Path, step: int, *files: str) -> Path:
    "A sealed checkpoint with nothing but these files."
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in files:
        (path / name).touch()
    seal(path)
    return path


@pytest.mark.parametrize("lost", PARTS)
def test_a_checkpoint_without_one_of_its_parts_does_not_count(lost, tmp_path):
    whole = checkpoint(tmp_path, 10, *PARTS)
    checkpoint(tmp_path, 20, *(name for name in PARTS if name != lost))
    checkpoint(tmp_path, 30, lost)
    assert last_checkpoint(tmp_path) == whole
    (whole / lost).unlink()
    assert last_checkpoint(tmp_path) is None


def test_states_do_not_mix(tmp_path):
    class Twice(MovingAverage):
        "A second strategy with the same names of tensors."

    layer = torch.nn.Linear(2, 2)
    first, second = Strategies([MovingAverage(0.5), Twice(0.9)]), Strategies([MovingAverage(0.5), Twice(0.9)])
    for strategies in (first, second):
        for member in strategies.members:
            member.start(type("Training", (), {"model": layer, "masters": {}}))
    with torch.no_grad():
        layer.weight.add_(1)
    first.each("after_step")
    save_state(state_of(first), tmp_path)
    load_state(second, tmp_path)
    for one, other in zip(first.members, second.members):
        assert one.steps == other.steps == 1 and torch.equal(one.average["weight"], other.average["weight"])
    assert (tmp_path / STATE_FILE).is_file() and [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize("scheme", ["ranknet", "lambda_rank"])
def test_list_losses_pull_like_those_of_sentence_transformers(scheme):
    """The gradients point the same way on scores in any order, up to a common factor per list: theirs takes logarithms to base 2 and, for LambdaRank,
    gains 2^y - 1, which for gains of 0 and 1 are ours."""
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    from esci_nb.model.list_losses import lambda_rank_loss, ranknet_loss
    torch.manual_seed(0)
    score, gain = torch.randn(12, requires_grad=True), (torch.rand(12) > 0.6).float()

    class Scores(torch.nn.Module):
        "What their losses ask of a model: the logits of (query, document) pairs."
        num_labels, device = 1, torch.device("cpu")

        def preprocess(self, pairs, **options):
            return {"at": torch.tensor([int(document) for _, document in pairs])}

        def forward(self, features, **options):
            return {"scores": score[features["at"]]}

    weighing = losses.NoWeightingScheme() if scheme == "ranknet" else losses.LambdaRankScheme()
    theirs = losses.LambdaLoss(Scores(), weighting_scheme=weighing)([["query"], [list(map(str, range(12)))]], [gain])
    ours = {"ranknet": ranknet_loss, "lambda_rank": lambda_rank_loss}[scheme](score, gain, torch.zeros(12))
    one, other = (torch.autograd.grad(loss, score, retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.999
