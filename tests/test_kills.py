"""Nothing is lost by a kill: a grid of two rounds, of which the command, a worker and a kernel are killed. The long one, with the whole tree, is
`python tests/kill_grid.py --kills 100`."""
import random

from kill_grid import kill_one_grid, undisturbed


def test_a_killed_grid_ends_as_if_nothing_had_happened(tiny_files, tmp_path):
    expected, seconds = undisturbed(tmp_path, tiny_files, [0], 2)
    assert sum(name.endswith("DONE") for name in expected) == 5
    counted, problems = kill_one_grid(tmp_path, "killed", tiny_files, [0], 2, expected, seconds / 4, ["command", "worker", "kernel"], random.Random(1))
    assert counted == 3 and not problems, problems
