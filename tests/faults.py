"""Everything that may be wrong with a submission, one fault at a time, and the packed notebook run over each.

`FAULTS` spoil a copy of the input folder (test lists, catalogue, package of three models and a fitted method) or the machine. The cells of the packed notebook
are run one after the other, as Jupyter would, in a process forked from one that has torch loaded. Whatever is wrong, there must be a valid file and no exception.
"""
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ALL = 3  # models in the package


@dataclass
class Place:
    "The input folder of one try."
    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "package"

    def model(self, name: str = "weak") -> Path:
        return self.package / "models" / name

    def file(self, pattern: str) -> Path:
        return next((self.folder / "data").glob(pattern))

    def manifest(self, change: Callable[[dict], object]) -> None:
        "Change the manifest in place."
        path = self.package / "manifest.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def entry(self, **values) -> None:
        "Change the entry of the model `weak` in the manifest."
        self.manifest(lambda manifest: next(one for one in manifest["models"] if one["name"] == "weak").update(values))

    def rehash(self, path: Path) -> None:
        "Make the manifest believe that a changed file is what was packed."
        from hashlib import sha256
        digest = sha256(path.read_bytes()).hexdigest()

        def change(manifest: dict) -> None:
            for one in manifest["models"]:
                if (self.package / one["folder"]) == path.parent:
                    one["files"][path.name] = digest
            for part in ("method", "wheels"):
                if path.relative_to(self.package).as_posix() in manifest[part]:
                    manifest[part][path.relative_to(self.package).as_posix()] = digest
        self.manifest(change)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def of_model(name: str, change: Callable[[Path], object], believed: bool = True) -> Callable[[Place], None]:
    "Change a file of the model `weak`; `believed`: the manifest has its new hash."
    def spoil(place: Place) -> None:
        path = place.model() / name
        change(path)
        if believed:
            place.rehash(path)
    return spoil


def as_json(**values) -> Callable[[Path], None]:
    "Change values of a JSON file; None removes one."
    def change(path: Path) -> None:
        value = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: one for name, one in value.items() if one is not None}))
    return change


def of_weights(change: Callable[[dict], dict]) -> Callable[[Place], None]:
    "Change the tensors of the model `weak`."
    def rewrite(path: Path) -> None:
        from safetensors.numpy import load_file, save_file
        save_file(change(load_file(path)), path)
    return of_model("model.safetensors", rewrite)


def filled(value: float) -> Callable[[Place], None]:
    return of_weights(lambda tensors: {name: np.full_like(tensor, value) for name, tensor in tensors.items()})


def of_method(change: Callable[[Path], object], believed: bool = True) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        change(place.package / "method.json")
        if believed:
            place.rehash(place.package / "method.json")
    return spoil


def of_tables(pattern: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Place], None]:
    "Write a table of the data anew."
    def spoil(place: Place) -> None:
        path = place.file(pattern)
        change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
    return spoil


def every_model(change: Callable[[Path], object]) -> Callable[[Place], None]:
    return lambda place: [change(path) for path in sorted(place.package.glob("models/*"))]


def with_first(table: pd.DataFrame, **values) -> pd.DataFrame:
    "The table with other values in its first row."
    table = table.copy()
    for name, value in values.items():
        table.loc[0, name] = value
    return table


def with_row(table: pd.DataFrame, **values) -> pd.DataFrame:
    "The table and its first row once more, with other values."
    return pd.concat([table, table.head(1).assign(**values)])


def link_out(place: Place) -> None:
    outside = place.folder.parent / "outside"
    shutil.move(place.model(), outside)
    place.model().symlink_to(outside)


def as_released(place: Place) -> None:
    "The lists and the catalogue as parquet files, texts as categories."
    lists, products = (pd.read_csv(place.file(name), dtype=str, keep_default_na=False) for name in ("test*", "product*"))
    lists = lists.rename(columns={"query_locale": "product_locale"}).astype({"query_id": "int64"}).assign(split="test", small_version=1)
    products = products.rename(columns={"product_color_name": "product_color"}).astype("category")
    for path in (place.file("test*"), place.file("product*")):
        path.unlink()
    lists.assign(esci_label="E", large_version=1, example_id=range(len(lists))).to_parquet(place.folder / "data" / "examples.parquet")
    products.to_parquet(place.folder / "data" / "products.parquet")


def latin(place: Place) -> None:
    "One product's title in another encoding."
    path = place.file("product*")
    data = pd.read_csv(path, dtype=str, keep_default_na=False)
    path.unlink()
    text = with_first(data, product_title="caf\u00e9").to_csv(index=False).encode().replace("caf\u00e9".encode(), b"caf\xe9", 1)
    (place.folder / "data" / "product_catalogue.csv").write_bytes(text)


@dataclass(frozen=True)
class Fault:
    "`spoil` changes the input, `before` is code that runs in the notebook's process before it; `used`: models that still rank; `says`: a part of what is said."
    spoil: Callable[[Place], object] = lambda place: None
    used: int = ALL
    says: str = ""
    before: str = ""
    parameters: dict | None = None


BM25 = "stays as it was before"
MODEL_FAULTS = {
    "weights: a bit": Fault(of_model("model.safetensors", flip, False), 2, "It is left out"),
    "weights: cut": Fault(of_model("model.safetensors", cut, False), 2, "It is left out"),
    "weights: empty": Fault(of_model("model.safetensors", lambda path: path.write_bytes(b""), False), 2, "It is left out"),
    "weights: missing": Fault(of_model("model.safetensors", Path.unlink, False), 2, "It is left out"),
    "weights: cut, believed": Fault(of_model("model.safetensors", cut), 2, "going on without it"),
    "weights: empty, believed": Fault(of_model("model.safetensors", lambda path: path.write_bytes(b"")), 2, "going on without it"),
    "weights: header huge": Fault(of_model("model.safetensors", lambda path: path.write_bytes(b"\xff" * 64)), 2, "going on without it"),
    "weights: NaN": Fault(filled(np.nan), 2, "no finite numbers"),
    "weights: infinite": Fault(filled(np.inf), 2, "no finite numbers"),
    "weights: a tensor less": Fault(of_weights(lambda tensors: dict(list(tensors.items())[1:])), 2, "going on without it"),
    "weights: a tensor more": Fault(of_weights(lambda tensors: tensors | {"more": np.zeros(3, np.float32)}), 2, "going on without it"),
    "weights: three classes": Fault(of_weights(lambda tensors: tensors | {"head.weight": tensors["head.weight"][:3]}), 2, "going on without it"),
    "weights: a pickle": Fault(of_model("model.safetensors", lambda path: path.write_bytes(b"\x80\x04cposix\nsystem\n.")), 2, "going on without it"),
    "tokenizer: missing": Fault(of_model("tokenizer.json", Path.unlink, False), 2, "It is left out"),
    "tokenizer: cut": Fault(of_model("tokenizer.json", cut), 2, "going on without it"),
    "tokenizer: empty object": Fault(of_model("tokenizer.json", lambda path: path.write_text("{}")), 2, "going on without it"),
    "tokenizer: not in the manifest": Fault(lambda place: (place.manifest(lambda manifest: [one["files"].pop("tokenizer.json")
                                            for one in manifest["models"] if one["name"] == "weak"]), (place.model() / "tokenizer.json").unlink()), 2,
                                            "It is left out"),
    "tokenizer: too many tokens": Fault(of_model("config.json", as_json(vocab_size=20)), 2, "going on without it"),
    "tokenizer: no padding": Fault(of_model("tokenizer_config.json", as_json(pad_token=None)), None),
    "tokenizer config: missing": Fault(of_model("tokenizer_config.json", Path.unlink, False), 2, "It is left out"),
    "tokenizer config: garbage": Fault(of_model("tokenizer_config.json", lambda path: path.write_text("{")), None),
    "tokenizer config: foreign class": Fault(of_model("tokenizer_config.json", as_json(tokenizer_class="ByteDance9")), None, ""),
    "config: missing": Fault(of_model("config.json", Path.unlink, False), 2, "It is left out"),
    "config: empty file": Fault(of_model("config.json", lambda path: path.write_text("")), 2, "going on without it"),
    "config: empty object": Fault(of_model("config.json", lambda path: path.write_text("{}")), 2, "going on without it"),
    "config: a list": Fault(of_model("config.json", lambda path: path.write_text("[]")), 2, "going on without it"),
    "config: unknown family": Fault(of_model("config.json", as_json(model_type="gpt9")), 2, "going on without it"),
    "config: another family": Fault(of_model("config.json", as_json(model_type="xlm-roberta")), None, ""),
    "config: other sizes": Fault(of_model("config.json", as_json(hidden_size=64)), 2, "going on without it"),
    "config: remote code": Fault(of_model("config.json", as_json(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})), 2, "going on without it"),
    "config: short positions": Fault(of_model("config.json", as_json(max_position_embeddings=4)), 2, "going on without it"),
    "head: missing": Fault(of_model("head.json", Path.unlink, False), 2, "It is left out"),
    "head: garbage": Fault(of_model("head.json", lambda path: path.write_text("]")), 2, "It is left out"),
    "head: reversed": Fault(of_model("head.json", as_json(labels=["I", "C", "S", "E"])), 2, "is a model of the classes"),
    "head: three classes": Fault(of_model("head.json", as_json(labels=["E", "S", "I"])), 2, "is a model of the classes"),
    "head: no labels": Fault(of_model("head.json", as_json(labels=None)), 2, "is a model of the classes"),
    "head: unknown pooling": Fault(of_model("head.json", as_json(pooling="max")), 2, "going on without it"),
    "folder: missing": Fault(lambda place: shutil.rmtree(place.model()), 2, "It is left out"),
    "folder: a file": Fault(lambda place: (shutil.rmtree(place.model()), place.model().write_text("x")), 2, "It is left out"),
    "folder: a link out": Fault(link_out, 2, "is not inside the folder"),
    "all models: a bit": Fault(every_model(lambda path: flip(path / "model.safetensors")), 0, BM25),
    "all models: missing": Fault(every_model(shutil.rmtree), 0, BM25),
    "all models: NaN, believed": Fault(lambda place: [filled(np.nan)(Other(place.folder, name)) for name in ("strong", "weak", "english")], 0, "by BM25"),
}


class Other(Place):
    "A place whose own model is another one."

    def __init__(self, folder: Path, name: str):
        super().__init__(folder)
        self.name = name

    def model(self, name: str = "") -> Path:
        return super().model(name or self.name)


MANIFEST_FAULTS = {
    "manifest: missing": Fault(lambda place: (place.package / "manifest.json").unlink(), 0, BM25),
    "manifest: empty": Fault(lambda place: (place.package / "manifest.json").write_text(""), 0, BM25),
    "manifest: not JSON": Fault(lambda place: (place.package / "manifest.json").write_text("{"), 0, BM25),
    "manifest: no UTF-8": Fault(lambda place: (place.package / "manifest.json").write_bytes(b"\xff\xfe\x00"), 0, BM25),
    "manifest: a list": Fault(lambda place: (place.package / "manifest.json").write_text("[1]"), 0, BM25),
    "manifest: cut": Fault(lambda place: cut(place.package / "manifest.json"), 0, BM25),
    "manifest: format 99": Fault(lambda place: place.manifest(lambda manifest: manifest.update(format=99)), 0, "format 99"),
    "manifest: no models": Fault(lambda place: place.manifest(lambda manifest: manifest.pop("models")), 0, BM25),
    "manifest: models empty": Fault(lambda place: place.manifest(lambda manifest: manifest.update(models=[])), 0, BM25),
    "manifest: models a word": Fault(lambda place: place.manifest(lambda manifest: manifest.update(models="three")), 0, BM25),
    "manifest: a number among the models": Fault(lambda place: place.manifest(lambda manifest: manifest["models"].append(7)), 3, "broken entry"),
    "manifest: an empty model": Fault(lambda place: place.manifest(lambda manifest: manifest["models"].append({})), 3, "broken entry"),
    "manifest: a model twice": Fault(lambda place: place.manifest(lambda manifest: manifest["models"].append(manifest["models"][0])), 3, "twice"),
    "manifest: no method": Fault(lambda place: place.manifest(lambda manifest: manifest.pop("method")), 3, "the plain mean"),
    "manifest: method a list": Fault(lambda place: place.manifest(lambda manifest: manifest.update(method=[1])), 3, "the plain mean"),
    "manifest: method outside": Fault(lambda place: place.manifest(lambda manifest: manifest.update(method={"../data/x": "0"})), 3, "not inside"),
    "manifest: scorers a number": Fault(lambda place: place.manifest(lambda manifest: manifest.update(scorers=3)), 3, "broken entry scorers"),
    "manifest: a scorer without files": Fault(lambda place: place.manifest(lambda manifest: manifest.update(scorers={"x": {}})), 3, "broken entry of the scorer x"),
    "manifest: no wheels": Fault(lambda place: place.manifest(lambda manifest: manifest.pop("wheels")), 0, BM25),
    "manifest: no needs": Fault(lambda place: place.manifest(lambda manifest: manifest.pop("needs")), 3),
    "manifest: needs the future": Fault(lambda place: place.manifest(lambda manifest: manifest["needs"].update(pandas="99.1")), 3, "older than 99.1"),
    "manifest: a wheel outside": Fault(lambda place: place.manifest(lambda manifest: manifest["wheels"].update({"../../evil-1-py3-none-any.whl": "0"})),
                                       3, "missing or broken"),
    "manifest: two packages": Fault(lambda place: shutil.copytree(place.package, place.folder / "again"), 0, "2 folders"),
    "entry: no folder": Fault(lambda place: place.manifest(lambda manifest: manifest["models"][0].pop("folder")), 2, "broken entry"),
    "entry: folder above": Fault(lambda place: place.entry(folder="../package/models/weak"), 2, "not inside"),
    "entry: folder absolute": Fault(lambda place: place.entry(folder="/etc"), 2, "not inside"),
    "entry: folder a number": Fault(lambda place: place.entry(folder=7), 2, "broken entry"),
    "entry: file above": Fault(lambda place: place.manifest(lambda manifest: manifest["models"][0]["files"].update({"../../manifest.json": "0"})), 2,
                               "not inside"),
    "entry: shares a word": Fault(lambda place: place.entry(shares={"us": "much"}), 2, "broken entry"),
    "entry: no shares": Fault(lambda place: place.entry(shares={}), 2, "broken entry"),
    "entry: negative shares": Fault(lambda place: place.entry(shares={"us": -1.0}), 2, "broken entry"),
    "entry: unknown locale": Fault(lambda place: place.entry(shares={"xx": 1.0}), 2, "broken entry"),
    "entry: cv NaN": Fault(lambda place: place.entry(cv=float("nan")), 2, "broken entry"),
    "entry: cv a word": Fault(lambda place: place.entry(cv="good"), 2, "broken entry"),
    "entry: cv unknown": Fault(lambda place: place.entry(cv=None), 3),
    "entry: work 0": Fault(lambda place: place.entry(work=0), 2, "broken entry"),
    "entry: unknown recipe field": Fault(lambda place: place.entry(recipe={"speed": 3}), 2, "broken entry"),
    "entry: recipe of words": Fault(lambda place: place.entry(recipe={"max_length": "long"}), 2, "broken entry"),
    "entry: recipe missing": Fault(lambda place: place.entry(recipe=None), 2, "broken entry"),
    "entry: field that is not there": Fault(lambda place: place.manifest(lambda manifest: manifest["models"][0]["recipe"].update(text_fields=["title9"])),
                                            None, ""),
    "entry: tiny max_length": Fault(lambda place: place.manifest(lambda manifest: manifest["models"][0]["recipe"].update(max_length=8)), None, ""),
    "entry: no texts": Fault(lambda place: place.entry(texts={}), 2, "broken entry"),
    "entry: unknown marker": Fault(lambda place: place.entry(texts={"clean": True, "markers": False, "special_tokens": ["[SIZE9]"]}), 2,
                                   "going on without it"),
}
METHOD_FAULTS = {
    "method: missing": Fault(of_method(Path.unlink, False), 3, "the plain mean"),
    "method: a bit": Fault(of_method(flip, False), 3, "the plain mean"),
    "method: cut, believed": Fault(of_method(cut), 3, "the plain mean"),
    "method: empty object": Fault(of_method(lambda path: path.write_text("{}")), 3, "the plain mean"),
    "method: unknown name": Fault(of_method(as_json(name="oracle", method="oracle")), None, ""),
    "method: other members": Fault(of_method(lambda path: path.write_text(path.read_text().replace("strong", "gone"))), 3, "the plain mean"),
    "method: NaN": Fault(of_method(lambda path: path.write_text(path.read_text().replace("0.", "NaN, 0."))), 3, "the plain mean"),
}
WHEEL_FAULTS = {
    "our wheel: a bit": Fault(lambda place: flip(next(place.package.glob("esci_nb*.whl"))), 0, BM25),
    "our wheel: missing": Fault(lambda place: next(place.package.glob("esci_nb*.whl")).unlink(), 0, BM25),
    "our wheel: a folder": Fault(lambda place: (next(place.package.glob("esci_nb*.whl")).rename(place.folder / "was"),
                                                (place.package / "esci_nb-0.1.0-py3-none-any.whl").mkdir()), 0, BM25),
    "our wheel: garbage, believed": Fault(lambda place: [(path.write_bytes(b"PK"), place.rehash(path)) for path in place.package.glob("esci_nb*.whl")], 0,
                                          BM25),
    "wheels: one with a bit": Fault(lambda place: flip(next(place.package.glob("wheels/emoji*"))), None, "missing or broken"),
    "wheels: missing": Fault(lambda place: shutil.rmtree(place.package / "wheels"), None, "missing or broken"),
    "notebook: changed": Fault(lambda place: (place.package / "submission.ipynb").write_text("{}"), 3, "is broken"),
}
DATA_FAULTS = {
    "catalogue: unknown locale": Fault(of_tables("product*", lambda table: with_row(table, product_locale="xx")), 3, "goes on with what can be read"),
    "catalogue: contradicting rows": Fault(of_tables("product*", lambda table: with_row(table, product_brand="other")), 3, "goes on"),
    "catalogue: repeated rows": Fault(of_tables("product*", lambda table: pd.concat([table, table.head(3)])), 3, "repeated"),
    "catalogue: blank titles": Fault(of_tables("product*", lambda table: table.assign(product_title=table["product_title"].where(table.index % 2 == 0, " "))),
                                     3, "goes on"),
    "catalogue: blank id": Fault(of_tables("product*", lambda table: with_row(table, product_id="")), 3, "goes on"),
    "catalogue: no descriptions": Fault(of_tables("product*", lambda table: table.drop(columns="product_description")), 3, "goes on"),
    "catalogue: half of the products": Fault(of_tables("product*", lambda table: table[table.index % 2 == 0]), 3, "are in no catalogue"),
    "catalogue: none of the products": Fault(of_tables("product*", lambda table: table.assign(product_id="B" + table["product_id"])), None, "in no catalogue"),
    "catalogue: latin-1": Fault(latin, 3, "goes on"),
    "catalogue: cut": Fault(lambda place: cut(place.file("product*")), 0, BM25),
    "catalogue: empty": Fault(lambda place: place.file("product*").write_bytes(b""), 0, BM25),
    "catalogue: missing": Fault(lambda place: place.file("product*").unlink(), 0, BM25),
    "catalogue: twice": Fault(lambda place: shutil.copy(place.file("product*"), place.folder / "data" / "more.csv.zip"), 3),
    "catalogue: a second one, cut": Fault(lambda place: (place.folder / "data" / "more.parquet").write_bytes(b"PAR1" * 9), 3),
    "others: hidden copies": Fault(lambda place: [(place.folder / name).mkdir() or shutil.copy(place.file("test*"), place.folder / name)
                                                  for name in ("__MACOSX", ".ipynb_checkpoints")], 3),
    "others: broken tables": Fault(lambda place: [(place.folder / f"x{number}.{end}").write_bytes(data) for number, (end, data) in enumerate(
        [("csv", b"\x00\x01"), ("parquet", b""), ("csv.zip", b"PK"), ("csv", b"")])], 3),
    "others: a sample submission": Fault(lambda place: (place.folder / "sample.csv").write_text("product_id,query_id\nB0,1\n"), 3),
    "lists: unknown locale": Fault(of_tables("test*", lambda table: with_first(table, query_locale="xx")), 3, "goes on"),
    "lists: repeated pairs": Fault(of_tables("test*", lambda table: pd.concat([table, table.head(5)])), 3),
    "lists: a query with two texts": Fault(of_tables("test*", lambda table: with_first(table, query="something else")), 3, "goes on"),
    "lists: a blank query": Fault(of_tables("test*", lambda table: with_first(table, query="")), 3, "goes on"),
    "lists: odd products": Fault(of_tables("test*", lambda table: with_first(table, product_id="NA")), 3, "in no catalogue"),
    "lists: no query ids": Fault(of_tables("test*", lambda table: table.drop(columns="query_id")), 3),
    "released files, categories": Fault(as_released, 3),
}
OUT_OF_MEMORY = """
import torch
_linear = torch.nn.Linear.forward
def forward(self, x):
    if {when}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    return _linear(self, x)
torch.nn.Linear.forward = forward
"""
MACHINE_FAULTS = {
    "time: none": Fault(parameters={"hours": 0.0}, used=0, says=BM25),
    "time: two seconds": Fault(parameters={"hours": 2 / 3600}, used=None),
    "time: five seconds": Fault(parameters={"hours": 5 / 3600}, used=None),
    "memory: short for large batches": Fault(before=OUT_OF_MEMORY.format(when="x.shape[0] > 8"), says="batch halved"),
    "memory: none at all": Fault(before=OUT_OF_MEMORY.format(when="True"), used=0, says="going on without it"),
    "memory: none while loading": Fault(before="import safetensors.torch\ndef load_file(*given): raise MemoryError()\nsafetensors.torch.load_file = load_file",
                                        used=0, says="going on without it"),
    "pip is broken": Fault(before="import subprocess\ndef run(*given, **values): raise OSError('Cannot allocate memory')\nsubprocess.run = run",
                           used=0, says=BM25),
    "torch is broken": Fault(before="import sys\nsys.modules['torch'] = None", used=0, says=BM25),
    "transformers is missing": Fault(before="import sys\nsys.modules['transformers'] = None", used=0, says=BM25),
    "scikit-learn is missing": Fault(before="import sys\nsys.modules['sklearn.feature_extraction.text'] = None", used=0, says=BM25),
    "large files cannot be written": Fault(before="import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))", used=0, says=BM25),
    "temporary space is missing": Fault(before="import tempfile\ndef none(*given, **values): raise OSError(28, 'No space left on device')\n"
                                               "tempfile.mkdtemp = none", used=0, says=BM25),
    "two processes": Fault(parameters={"processes": 2}, used=6),
}
FAULTS = {"nothing is wrong": Fault()} | MODEL_FAULTS | MANIFEST_FAULTS | METHOD_FAULTS | WHEEL_FAULTS | DATA_FAULTS | MACHINE_FAULTS

SERVER = """
import contextlib, json, os, sys, traceback
import torch, transformers, pandas, pyarrow.parquet, sklearn.feature_extraction.text, safetensors.torch
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(job["home"])
            with open(job["said"], "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                names = {"__name__": "__main__"}
                for cell in job["cells"]:
                    try:
                        exec(compile(cell, "cell", "exec"), names)
                    except BaseException:
                        traceback.print_exc()
                        raise
            code = 0
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    "The cells of packed notebooks, run in forks of one process of `python` that has torch loaded."

    def __init__(self, python: str = sys.executable):
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        self.server = subprocess.Popen([python, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=environment | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})

    def run(self, notebook: Path, home: Path, before: str = "", **parameters) -> tuple[int, str]:
        "The exit code and what the cells said; their parameters are set as papermill does, after the first code cell."
        cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        shown = [cell if not cell.rstrip().split("\n")[-1].isidentifier() else f"{cell.rstrip()}\n" + SHOW.format(cell.rstrip().split("\n")[-1])
                 for cell in cells[1:]]
        home.mkdir()
        job = {"cells": [cells[0], "\n".join(f"{name} = {value!r}" for name, value in parameters.items()), before, *shown],
               "home": str(home), "said": str(home / "said.txt")}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline()), (home / "said.txt").read_text()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


SHOW = "if {0} is not None: print({0}.to_string())"


def good_input(folder: Path) -> Path:
    "An input folder in which nothing is wrong, and the pristine notebook beside it; returns it."
    from packing import competition_files, tiny_ensemble, tiny_run

    from esci_nb.ship.package import pack
    titles = competition_files(folder / "input" / "data")["product_title"]
    runs = [tiny_run(folder / "runs" / name, titles, cv, locales, seed) for seed, (name, cv, locales) in enumerate(
        [("strong", 0.85, ("us", "es", "jp")), ("weak", 0.80, ("us", "es", "jp")), ("english", 0.83, ("us",))])]
    pack([tiny_ensemble(folder / "ensembles" / "simplex", runs)], folder / "input" / "package")
    shutil.copy(folder / "input" / "package" / "submission.ipynb", folder)
    return folder / "input"


def what_is_wrong(fault: Fault, good: Path, work: Path, runner: Runner) -> str:
    "Spoil a copy of the input, run the notebook over it, read-only; '' if all is as the fault expects."
    from esci_nb.rank.submission import check_submission
    from esci_nb.ship.first import find_attached, pairs_to_rank
    place = Place(work / "input")
    shutil.copytree(good, place.folder)
    fault.spoil(place)
    for path in sorted(place.folder.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*") if path.is_file()}
    output = work / "output"
    parameters = {"input_folder": str(place.folder), "output_folder": str(output), "hours": 1.0} | (fault.parameters or {})
    code, said = runner.run(good.parent / "submission.ipynb", work / "home", fault.before, **parameters)
    used = sum(line[:1].isdigit() and f" {state} " in line for line in said.splitlines() for state in ("used", "part"))
    try:
        pairs = pairs_to_rank(find_attached(place.folder)[0]).astype({"query_id": "int64"})
        check_submission(output / "submission.csv", pairs)
    except Exception as error:
        return f"no valid file: {error}\n{said}"
    if code or "Traceback" in said:
        return f"exit {code}\n{said}"
    if fault.used is not None and used != fault.used or fault.says not in said:
        return f"{used} models were used, not {fault.used}, or it does not say {fault.says!r}\n{said}"
    if [path.name for path in output.iterdir()] != ["submission.csv"]:
        return f"left behind: {sorted(path.name for path in output.iterdir())}"
    if before != {path: path.stat().st_mtime_ns for path in place.folder.rglob("*") if path.is_file()}:
        return "the input was changed"
    return ""


def main(names: Iterable[str], python: str) -> int:
    "Try faults with an interpreter; print what is wrong."
    import tempfile
    failed, names = 0, list(names) or list(FAULTS)
    with tempfile.TemporaryDirectory() as folder:
        good, runner = good_input(Path(folder) / "good"), Runner(python)
        for number, name in enumerate(names):
            wrong = what_is_wrong(FAULTS[name], good, Path(folder) / str(number), runner)
            failed += bool(wrong)
            print(f"{name}: {wrong or 'ok'}", flush=True)
            shutil.rmtree(Path(folder) / str(number), ignore_errors=True)
        runner.close()
    print(f"{len(names)} faults, {failed} without what they should give")
    return int(failed > 0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    given = sys.argv[1:]
    chosen = given.pop(0) if given and Path(given[0]).is_file() else sys.executable
    sys.exit(main(given, chosen))
