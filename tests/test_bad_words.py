"""Bad command lines: each ends with exit code 2 and one sentence, and writes nothing. A share runs always, all of them with FAULTS=1."""
import os
from pathlib import Path

import pytest

from esci_nb.cli import COMMANDS, main

HUGE = "1" + "0" * 400
NUMBERS = ("-1", "1.5", "one", "", "NaN", "Infinity", "1e999", HUGE, "٣", "1_0", "true", "null", "[]", "{}", '"1"')
VALUES = ("-1", "one", "", "NaN", "Infinity", "-Infinity", "1e999", HUGE, "٣", "true", "[1]", "{}", "[" * 3000)
NAMES = ("", "..", ".", "../up", "a/b", "/abs", "x" * 300, "a\0b", "a\nb", "\udcff")
GRID = ["grid", "sample", "--backbones", "small"]


def fields() -> list[list[str]]:
    "Wrong values of recipe fields and of settings of the data."
    lines = [["demo", "--set", f"{name}={value}"] for name in ("clip", "max_length", "lr_quarters", "epochs") for value in VALUES]
    lines += [["demo", "--set", f"{name}={value}"] for name in ("locales", "pooling", "precision", "text_fields", "adversary", "distill_from")
              for value in ("3", "[3]", "{}", "nothing", "true", '["a\\u0000"]')]
    lines += [["demo", "--data-set", f"{name}={value}"] for name in ("seed", "n_folds", "translated_weight") for value in VALUES]
    lines += [["demo", "--data-set", f"{name}={value}"] for name in ("over", "clean", "translate", "train_on") for value in ("3", "[3]", "atlantis", "{}")]
    taken = ("name", "data", "source", "outputs", "backbone", "backbones", "grid", "recipe", "recipes", "seed", "seeds", "fold", "folds", "self", "cls",
             "rounds", "n_folds", "overrides", "workers", "__class__", "model_config", "_")
    lines += [[*command, flag, f"{name}=1"] for command in (["demo"], GRID) for flag in ("--set",) for name in taken]
    lines += [[*GRID, "--data-set", f"{name}=1"] for name in taken if name not in ("seed", "n_folds")]
    lines += [["ladder", "sample", "--backbones", "small", "--variants", f"{name}=1"] for name in taken if name not in ("seed", "n_folds")]
    return [*lines, ["demo", "--set", "epochs"], ["demo", "--set", "=1"], ["demo", "--set", "ep ochs=1"], ["demo", "--set", "epochs=1", "epochs=1"]]


def flags() -> list[list[str]]:
    "Wrong values of flags, flags twice, flags that are not there, arguments that are missing."
    lines = [["demo", "--seed", value] for value in NUMBERS] + [["demo", "--n-folds", value] for value in NUMBERS]
    lines += [[*GRID, "--seeds", value] for value in NUMBERS] + [[*GRID, "--folds", value] for value in NUMBERS if value != "-1"]
    lines += [[*GRID, "--workers", value] for value in (*NUMBERS, "0", "100000")] + [[*GRID, "--plan", "--rate", value] for value in NUMBERS if value != "1.5"]
    lines += [["download", "sample", "OUT", "--scale", value] for value in (*NUMBERS, "0") if value != "1.5"]
    lines += [[*GRID, "--seeds", "1", "1"], [*GRID, "--folds", "0", "0"], [*GRID, "--recipes", "awp", "awp"], ["grid", "sample", "--backbones", "x", "x"]]
    lines += [["demo", "--seed", "1", "--seed", "2"], ["demo", "--set", "epochs=1", "--set", "lr=1"], [*GRID, "--recipes", "awp", "--recipes", "fgm"],
              ["demo", "--outputs", "a", "--outputs", "b"], ["demo", "--data", "sample", "--data", "sample"], ["demo", "--recipe", "awp", "--recipe", "awp"]]
    lines += [["runs", "--outputs", "nowhere"], ["runs", "some"], ["runs", "--all", "1"], ["compare"], ["compare", "a"], ["compare", "", "b"],
              ["compare", "nowhere", "neither"], ["compare", "..", "."], ["rerun"], ["rerun", ""], ["rerun", "nowhere"], ["rerun", "."],
              ["rerun", "a", "b"]]
    lines += [[*GRID, "--on", "moon"], [*GRID, "--address", "x"], [*GRID, "--slurm", "a=1"], [*GRID, "--on", "slurm", "--slurm", "a"]]
    lines += [["demo", "--recipe", name] for name in (*NAMES, "bsaeline", "3")] + [[*GRID, "--recipes", name] for name in NAMES]
    lines += [["recipes", name] for name in NAMES] + [["demo", "--no-such-flag"], ["bogus"], [], ["demo", "stray"], ["grid"], ["pack"], ["check"],
                                                        ["run"], ["ensemble"], ["download"], ["download", "esci"], ["download", "other", "OUT"],
                                                        ["demo", "--seed"], ["grid", "sample"], ["pack", "run"]]
    return lines + [[*start, flag, ""] for start, flag in ((["demo"], "--outputs"), (["demo"], "--data"), (["grid", "sample"], "--backbones"),
                                                             (["check", "sample"], "--submission"), (["ladder", "sample"], "--to"))]


def places() -> list[list[str]]:
    "Sources, targets and backbones that are none."
    lines = [["check", place] for place in ("/no/such", "/dev/null", "FILE", "", "a\0b", "/proc/1")]
    lines += [["demo", "--backbone", place] for place in ("/no/such", "FILE", "EMPTY", "no/such", "a\0b", "..", "/dev/null")]
    lines += [["demo", "--data", place] for place in ("/no/such", "/dev/null", "FILE", "EMPTY", "a\0b")]
    lines += [[command, "sample", "--backbones", "small", "--to", place] for command in ("ladder",) for place in ("/dev/null", "EMPTY", "LINK", "")]
    lines += [["rank", "FILE", "FILE", "--with", "EMPTY"], ["rank", "FILE", "FILE", "--with", "/no/such"], ["rank", "a", "b"],
              ["export", "EMPTY", "--to", "OUT"], ["export", "FILE", "--to", "OUT"], ["export", "EMPTY"], ["ensemble", "EMPTY"], ["ensemble", "FILE"], ["ensemble", "/no/such"], ["pack", "EMPTY", "--to", "OUT"], ["pack", "FILE", "--to", "OUT"],
              ["document", "EMPTY", "--to", "OUT"], ["document", "FILE", "--to", "OUT"], ["document", "EMPTY"], ["numbers"], ["numbers", "/no/such"],
              ["numbers", "FILE"], ["numbers", "sample", "sample"], ["numbers", "sample", "--to", "/dev/null"], ["runs", "--experiments", "/dev/null"],
              ["ensemble", "EMPTY", "--scores", "a"], ["ensemble", "EMPTY", "--scores", "a=b", "a=c"], ["ensemble", "EMPTY", "--leaderboard", "a=one"],
              ["ensemble", "EMPTY", "--leaderboard", "a=nan"], ["ensemble", "EMPTY", "--to", "/dev/null"], ["ensemble", "EMPTY", "--method", "median"],
              ["check", "sample", "--submission", "EMPTY"], ["check", "sample", "--submission", "/dev/null"], ["check", "sample", "--submission", "FILE"]]
    return lines


def stages() -> list[list[str]]:
    "Parameters of stages."
    lines = [["run", name] for name in (*NAMES, "trian", "ladder", "train", "ensemble", "report", "errors", "distill", "pseudo_label")]
    lines += [["run", "train", "--set", "data=EMPTY", f"{name}={value}"] for name, value in (
        ("fold", "one"), ("fold", "-2"), ("fold", HUGE), ("fold", "1.0"), ("seed", "-1"), ("seed", HUGE), ("seed", "true"), ("teacher", "9"), ("name", "x"),
        ("overrides", "[]"), ("overrides", '{"name":"x"}'), ("overrides", '{"fold":1}'), ("overrides", '{"epochs":"x"}'), ("overrides", '{"data":1}'),
        ("recipe", "no"), ("recipe", "../x"), ("backbone", "3"), ("backbone", '"a\\u0000"'), ("data", "x"), ("outputs", "3"), ("recipe", "[]"))]
    lines += [["run", "preprocess", "--set", f"{name}={value}"] for name, value in (
        ("source", "3"), ("source", "/no/such"), ("n_folds", "1"), ("n_folds", HUGE), ("n_folds", "true"), ("seed", "-1"), ("over", "x"), ("clean", "3"),
        ("translate", "us"), ("translate", "[1]"), ("translate", '["uk"]'), ("translated_weight", "NaN"), ("train_on", "[]"), ("sauce", "1"))]
    lines += [["run", "ensemble", "--set", "data=EMPTY", f"runs={runs}", extra] for runs, extra in (
        ("3", "method=mean"), ("[]", "method=mean"), ("[3]", "method=mean"), ('["EMPTY"]', "method=mean"), ('["EMPTY"]', "name=../x"),
        ('["EMPTY"]', "name=a/b"), ('["EMPTY"]', 'scores={"a":3}'), ('["EMPTY"]', 'scores={"a":"lost.csv"}'), ('["EMPTY"]', 'leaderboard={"a":"x"}'),
        ('["EMPTY"]', 'leaderboard={"a":NaN}'), ('["EMPTY"]', 'leaderboard=[1]'))]
    lines += [["run", stage, "--set", "data=EMPTY", 'runs=["EMPTY"]', extra] for stage in ("distill", "pseudo_label")
              for extra in ("name=..", "name=a/b", "outputs=3", f"name={'x' * 300}")]
    lines += [["run", "pseudo_label", "--set", "data=EMPTY", 'runs=["EMPTY"]', f"threshold={value}"] for value in ("-1", "2", "NaN", HUGE, '"x"', "true")]
    return lines


FILES = ["recipes = [", "recipes = 3", "recipes = [3]", "recipes = []", "recipes = ['awp', 'awp']", "seeds = 3", "seeds = []", "seeds = ['a']", "seeds = [-1]",
         "seeds = [1, 1]", "seeds = [1.5]", "seeds = [true]", f"seeds = [{HUGE}]", "seeds = [2020-01-01]", "seeds = [" + "9" * 5000 + "]", "folds = 1",
         "folds = [-2]", "folds = [0, 0]", "folds = []", "data = 3", "data = [1]", "[data]\nseed = -1", "[data]\nsource = 'x'", "[data]\noutputs = 'x'",
         "[data]\nn_folds = 1e9", "[[data]]\nn_folds = 3", "recipe = 3", "[recipe]\nepochs = 'x'", "[recipe]\nname = 'x'", "[recipe]\nfold = 1",
         "[recipe]\nclip = -1", "[recipe]\nlr = nan", "[recipe.awp]\nname = 'x'", "[recipe.awp]\nepochs = 'x'", "[recipe.awp.lr]\nx = 1", "[recipe.no]\nlr = 1",
         "[[backbone]]", "[[backbone]]\nname = 3", "[[backbone]]\nname = ''", "[[backbone]]\nname = 'small'\nepochs = 0", "backbone = 3", "backbone = [1]",
         "[backbone]\nname = 'x'", "[[ensemble]]", "[[ensemble]]\nname = 3", "[[ensemble]]\nname = ''", "[[ensemble]]\nname = '..'",
         "[[ensemble]]\nname = 'a/b'", "[[ensemble]]\nname = 'a'\nmethod = 'no'", "[[ensemble]]\nname = 'a'\nmethod = 3",
         "[[ensemble]]\nname = 'a'\nscores = 3", "[[ensemble]]\nname = 'a'\nscores = {x = 3}", "[[ensemble]]\nname = 'a'\nleaderboard = {x = 'y'}",
         "[[ensemble]]\nname = 'a'\nleaderboard = {x = nan}", "[[ensemble]]\nname = 'a'\nrecipes = ['www']", "[[ensemble]]\nname = 'a'\nrecipes = 3",
         "[[ensemble]]\nname = 'a'\n[[ensemble]]\nname = 'a'", "ensemble = 'x'", "a = 1", "recipes = ['awp']\nrecipes = ['fgm']", "x = " + "[" * 3000,
         b"recipes = ['\xff']", b"\x00", b"", "\ufeffrecipes = 3"]
LINES = [*fields(), *flags(), *places(), *stages()]
EVERY = 1 if os.environ.get("FAULTS") else 12


@pytest.fixture
def where(tmp_path, monkeypatch) -> Path:
    "A working folder with a file, an empty folder and a link, which must be all that is there afterwards."
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("no table")
    (tmp_path / "LINK").symlink_to(tmp_path / "FILE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refused(words: list[str], where: Path, capsys) -> None:
    "Exit code 2, one line on stderr, and the working folder as it was."
    before = sorted(where.iterdir())
    code, said = main(words), capsys.readouterr()
    assert code == 2 and said.err.startswith("esci-nb: ") and said.err.count("\n") == 1 and "Traceback" not in said.err, (code, said.err)
    assert len(said.err) < 900 and sorted(where.iterdir()) == before and not any((where / "EMPTY").iterdir()) and (where / "LINK").is_symlink()


@pytest.mark.parametrize("number", range(0, len(LINES), EVERY))
def test_words(number, where, capsys):
    refused(LINES[number], where, capsys)


@pytest.mark.parametrize("number", range(0, len(FILES), EVERY))
def test_grid_files(number, where, capsys):
    text = FILES[number]
    (where / "grid.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    backbones = [] if "backbone" in str(text) else ["--backbones", "EMPTY"]
    refused(["grid", "grid.toml", "sample", *backbones], where, capsys)


def test_there_are_enough_of_them():
    assert len(LINES) + len(FILES) > 400 and {line[0] for line in LINES if line} >= {*COMMANDS} - {"scale", "bench", "docs"}
