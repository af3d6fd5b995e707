"""A submission over everything that may be wrong with it: a few faults here, all of them with FAULTS=1 (minutes)."""
import os

import pytest

from faults import FAULTS, Runner, good_input, what_is_wrong

FEW = ("nothing is wrong", "weights: cut, believed", "manifest: cut", "our wheel: a bit", "catalogue: contradicting rows", "method: other members",
       "memory: short for large batches")


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    "The input without a fault, and what runs notebooks."
    runner = Runner()
    yield good_input(tmp_path_factory.mktemp("good")), runner
    runner.close()


@pytest.mark.parametrize("name", FAULTS if os.environ.get("FAULTS") else FEW)
def test_a_valid_file_whatever_is_wrong(tried, tmp_path, name):
    good, runner = tried
    wrong = what_is_wrong(FAULTS[name], good, tmp_path, runner)
    assert not wrong, wrong


def test_there_are_enough_faults():
    assert len(FAULTS) > 60 and set(FEW) <= set(FAULTS)
