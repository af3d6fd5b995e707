"""Translation: real models, kills, several workers at once, no leak across folds, and mistakes in one sentence."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from esci_nb.contract import LABELS, LOCALES, PROB_COLUMNS, InputError, is_original
from esci_nb.data.clean import clean_products, clean_queries
from esci_nb.data.folds import make_folds
from esci_nb.data.lexicon import SAMPLE_LOCALES, lexicon
from esci_nb.data.load import load
from esci_nb.data.merge import merge_tasks, normalise_query
from esci_nb.data.prepare import DataSettings, Processes, prepare_tables, work_in_parts
from esci_nb.data.translate import TranslationCache, sentences, translate_texts
from esci_nb.data.translated_rows import add_translations
from esci_nb.data.translators import Glossary, Seq2Seq, _languages, make_translator
from esci_nb.files import write_json, write_table
from esci_nb.folders import DataFolder
from esci_nb.run.stages import data_path
from esci_nb.strategy.distill import query_keys, read_soft_labels, teacher_folds, teacher_split
from esci_nb.strategy.pseudo import unlabelled_rows

SLOW_WORKER = '''
import sys, time
from esci_nb.data.translate import TranslationCache, translate_texts
import esci_nb.data.translate as module
module._CLAIM = 4

class Slow:
    name, locales, by_sentence = "slow", ("us", "es"), False
    def model_of(self, source, target): return "slow"
    def __call__(self, texts, source, target):
        time.sleep(0.05)
        with open(sys.argv[2], "a") as log:
            log.write("".join(text + "\\n" for text in texts))
        return [text.upper() for text in texts]

texts = [f"text number {i}" for i in range(int(sys.argv[3]))]
with TranslationCache(sys.argv[1]) as cache:
    assert translate_texts(texts, "us", "es", Slow(), cache) == [text.upper() for text in texts]
'''


def start_worker(cache: Path, log: Path, texts: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW_WORKER, str(cache), str(log), str(texts)], cwd=ROOT,
                            stderr=subprocess.PIPE, text=True)


def stored(cache: Path) -> int:
    try:
        with sqlite3.connect(cache) as database:
            return database.execute("select count(*) from translations").fetchone()[0]
    except sqlite3.Error:
        return 0


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


class Known:
    "A translator from a dict; other texts in capitals."
    name, locales, by_sentence = "known", LOCALES, False

    def __init__(self, known: dict | None = None):
        self.known = known or {}

    def model_of(self, source, target):
        return f"known {sorted(self.known.items())}"

    def __call__(self, texts, source, target):
        return [self.known.get(text, text.upper()) for text in texts]


@pytest.fixture(scope="module")
def folded(tiny_files):
    esci = load(tiny_files)
    return clean_queries(make_folds(merge_tasks(esci.examples), n_folds=3)), clean_products(esci.products)


@pytest.fixture(scope="module")
def translated(folded, tmp_path_factory):
    with TranslationCache(tmp_path_factory.mktemp("cache") / "t.sqlite") as cache:
        return add_translations(*folded, SAMPLE_LOCALES, Glossary(), cache, weight=0.25)


# The cache

def test_killed_worker_loses_only_what_it_held_and_the_next_goes_on_at_once(tmp_path):
    cache, log = tmp_path / "t.sqlite", tmp_path / "log"
    first = start_worker(cache, log, 60)
    wait_for(lambda: stored(cache) >= 12)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = stored(cache)
    assert 12 <= kept < 60
    second = start_worker(cache, log, 60)
    assert second.wait(timeout=60) == 0, second.stderr.read()
    asked = pd.Series(log.read_text().splitlines()).value_counts()
    assert len(asked) == stored(cache) == 60
    assert (asked > 1).sum() <= 4, "only the batch that the dead worker held is translated again"
    assert not list(tmp_path.glob("*.lock")), "lock files of dead workers are removed"


def test_two_workers_at_once_translate_nothing_twice(tmp_path):
    cache, log = tmp_path / "t.sqlite", tmp_path / "log"
    workers = [start_worker(cache, log, 120) for _ in range(2)]
    for worker in workers:
        assert worker.wait(timeout=90) == 0, worker.stderr.read()
    asked = log.read_text().splitlines()
    assert len(asked) == len(set(asked)) == 120
    with sqlite3.connect(cache) as database:
        assert database.execute("select count(*) from claims").fetchone() == (0,)


def test_killed_worker_beside_a_living_one(tmp_path):
    cache, log = tmp_path / "t.sqlite", tmp_path / "log"
    dying, living = start_worker(cache, log, 100), start_worker(cache, log, 100)
    wait_for(lambda: stored(cache) >= 16)
    os.kill(dying.pid, signal.SIGKILL)
    dying.wait()
    assert living.wait(timeout=90) == 0, living.stderr.read()
    assert stored(cache) == 100


def test_another_model_or_pair_is_another_answer(tmp_path):
    with TranslationCache(tmp_path / "t.sqlite") as cache:
        assert translate_texts(["a"], "us", "es", Known({"a": "b"}), cache) == ["b"]
        assert translate_texts(["a"], "us", "es", Known({"a": "c"}), cache) == ["c"]
        assert translate_texts(["a"], "us", "jp", Known({"a": "b"}), cache) == ["b"] and len(cache) == 3
        assert translate_texts(["a", ""], "us", "us", Known({"a": "b"}), cache) == ["a", ""], "its own language needs no translator"


def test_failing_translator_keeps_what_is_done_and_frees_the_rest(tmp_path):
    class Failing(Known):
        def __call__(self, texts, source, target):
            raise RuntimeError("no")
    with TranslationCache(tmp_path / "t.sqlite") as cache, pytest.raises(RuntimeError):
        translate_texts(["a"], "us", "es", Failing(), cache)
    with TranslationCache(tmp_path / "t.sqlite") as cache:
        assert translate_texts(["a"], "us", "es", Known(), cache) == ["A"]


def test_failing_translator_frees_its_claims_while_the_cache_stays_open(tmp_path):
    class Failing(Known):
        def __call__(self, texts, source, target):
            raise RuntimeError("no")
    with TranslationCache(tmp_path / "t.sqlite") as one, TranslationCache(tmp_path / "t.sqlite") as other:
        with pytest.raises(RuntimeError):
            translate_texts(["a"], "us", "es", Failing(), one)
        assert translate_texts(["a"], "us", "es", Known(), other) == ["A"]


def test_broken_cache_is_one_sentence(tmp_path):
    (tmp_path / "t.sqlite").write_text("this is no database, but long enough to look like a file of one " * 20)
    with pytest.raises(InputError, match="t.sqlite cannot be used .*delete the file"):
        TranslationCache(tmp_path / "t.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        TranslationCache(tmp_path / "file" / "t.sqlite")


# The glossary

@pytest.mark.parametrize("source", SAMPLE_LOCALES)
@pytest.mark.parametrize("target", SAMPLE_LOCALES)
def test_glossary_knows_the_sample(source, target, folded):
    if source == target:
        return
    rows, products = folded
    titles = products.loc[products["product_locale"] == source, "product_title"].head(300).tolist()
    new = Glossary()(titles, source, target)
    names = {name.lower() for name in lexicon(target).names.ravel()}
    share = np.mean([any(name in title.lower() for name in names) for title in new])
    assert share > 0.95, "the kind of thing is named in the other language"
    assert new == Glossary()(titles, source, target) and all(new)
    queries = rows.loc[rows["product_locale"] == source, "query"].unique().tolist()
    assert np.mean([one != two for one, two in zip(queries, Glossary()(queries, source, target))]) > 0.95


def test_sentences_lose_nothing():
    text = "Made to last. 1.7 L; no more! 軽量です。らくらく。 end"
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


# Rows

def test_translated_rows_keep_label_group_and_fold(translated, folded):
    rows, products = translated
    originals, _ = folded
    new = rows[~is_original(rows)]
    origin = originals.set_index("example_id").loc[new["origin"]]
    for name in ("query_id", "esci_label", "fold", "product_locale", "split"):
        assert (new[name].to_numpy() == origin[name].to_numpy()).all(), name
    assert (new["split"] == "train").all() and (new["language"] != new["product_locale"]).all()
    assert np.allclose(new["weight"], origin["weight"].to_numpy() * 0.25) and (new["source"] == "translated").all()
    assert rows["example_id"].is_unique and rows["example_id"].dtype == "int64"
    key = ["product_id", "product_locale"]
    assert not products.duplicated(key).any() and len(rows.merge(products[key], on=key)) == len(rows)
    trains = originals[originals["split"] == "train"]
    assert len(new) + rows.attrs["translated"]["left out"] == 2 * len(trains), "each train row in both other languages"


def test_no_text_crosses_a_fold(folded, tmp_path):
    rows, products = folded
    trains = rows[(rows["split"] == "train") & (rows["product_locale"] == "us")]
    one, two = (trains.loc[trains["fold"] == fold, "query"].iloc[0] for fold in (0, 1))
    spanish = rows[(rows["product_locale"] == "es")]
    in_fold_0 = spanish.loc[(spanish["split"] == "train") & (spanish["fold"] == 0), "query"].iloc[0]
    in_test = spanish.loc[spanish["split"] == "test", "query"].iloc[0]
    third = trains.loc[(trains["fold"] == 0) & (trains["query"] != one), "query"].iloc[0]
    with TranslationCache(tmp_path / "t.sqlite") as cache:
        known = {one: in_fold_0.upper(), two: f" {in_fold_0}  ", third: in_test}
        new, _ = add_translations(rows, products, ["es"], Known(known), cache)
    kept = new[(new["source"] == "translated") & (new["product_locale"] == "us")]
    groups = {name: set(trains.loc[trains["query"] == text, "query_id"]) for name, text in (("same", one), ("other", two), ("test", third))}
    assert groups["same"] <= set(kept["query_id"]), "the same fold may share a text"
    assert not (groups["other"] | groups["test"]) & set(kept["query_id"])
    assert new.attrs["translated"]["left out"] == trains["query"].isin([two, third]).sum()
    part = new["fold"].where(new["split"] == "train", -2)
    text = new["language"] + " " + normalise_query(new["query"])
    original = is_original(new)
    held = part[original].groupby(text[original]).agg(set)
    crossing = [p not in held.get(t, {p}) for p, t in zip(part[~original], text[~original])]
    assert not any(crossing)


@pytest.fixture(scope="module")
def data(translated, tmp_path_factory):
    rows, products = translated
    return DataFolder(tmp_path_factory.mktemp("data") / "tiny", rows, products, {"n_folds": 3})


def test_only_originals_are_scored_ranked_and_pseudo_labelled(data):
    original = is_original(data.rows)
    assert original[data.test].all() and len(data.test)
    for fold in range(3):
        assert original[data.held_out(fold)].all() and original[unlabelled_rows(data, fold)].all()
        train, held = data.rows.iloc[data.train(fold)], data.rows.iloc[data.held_out(fold)]
        assert not set(train["query_id"]) & set(held["query_id"]) and (train["source"] == "translated").any()
        for key in query_keys(data.rows):
            assert not np.isin(key[data.held_out(fold)], key[data.train(fold)]).any()
        assert set(data.train(fold, translated=False)) == {i for i in data.train(fold) if original[i]}


def test_teachers_never_see_a_translation_of_what_they_label(data):
    part = teacher_folds(data.rows)
    new = ~is_original(data.rows)
    origin = pd.Index(data.rows["example_id"]).get_indexer(data.rows["origin"])
    assert (part[new] == part[origin[new]]).all() and set(part[new]) == {0, 1, 2}
    labelled = []
    for teacher in range(3):
        trained, labels = teacher_split(data, 0, teacher)
        assert not set(data.rows["query_id"].iloc[trained]) & set(data.rows["query_id"].iloc[labels])
        assert not new[labels].any() and new[trained].any()
        labelled += labels.tolist()
    assert sorted(labelled) == data.train(0, translated=False).tolist()


def test_soft_label_of_a_translation_is_that_of_its_origin(data, tmp_path):
    wanted = data.train(0, translated=False)
    soft = np.random.default_rng(0).dirichlet(np.ones(len(LABELS)), len(wanted)).astype("float32")
    table = pd.DataFrame(soft, columns=list(PROB_COLUMNS)).assign(example_id=data.rows["example_id"].to_numpy()[wanted], fold=np.int8(0))
    write_table(table, tmp_path / "soft.parquet")
    write_json({"data": data.name, "folds": [0]}, tmp_path / "config.json")
    (tmp_path / "DONE").touch()
    found = read_soft_labels(tmp_path, data, 0)
    train = data.rows.iloc[data.train(0)]
    expected = table.set_index("example_id").loc[train["origin"], list(PROB_COLUMNS)].to_numpy()
    assert np.allclose(found, expected) and len(found) > len(wanted)
    english = data.only(["us"])
    orphans = ~english.rows["origin"].isin(english.rows["example_id"]).to_numpy()
    assert orphans.any() and (teacher_folds(english.rows)[orphans] == -1).all() and not orphans[english.held_out(0)].any()


# The way through the stage

def test_preparation_goes_on_where_it_was_killed(tiny_files, tmp_path):
    code = f'''
import time
from pathlib import Path
import esci_nb.data.prepare as module
from esci_nb.data.folds import make_folds
from esci_nb.data.load import load
from esci_nb.data.merge import merge_tasks
quick = module.clean_products
def slow(products):
    time.sleep(0.3)
    return quick(products)
module.clean_products = slow
esci = load({str(tiny_files)!r})
module.prepare_tables(make_folds(merge_tasks(esci.examples)), esci.products, module.DataSettings(), Path({str(tmp_path)!r}) / "parts", Path("none"), part_rows=100)
'''
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: len(list(tmp_path.glob("parts/cleaned-*.parquet"))) >= 3)
    import psutil
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), "workers leave with their parent"
    esci = load(tiny_files)
    rows = make_folds(merge_tasks(esci.examples))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/cleaned-*.parquet")}
    assert 3 <= len(kept) < -(-len(esci.products) // 100)
    whole = work_in_parts(esci.products, clean_products, tmp_path / "parts", "cleaned", part_rows=100)
    assert whole.equals(clean_products(esci.products))
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "what was there is not done again"
    made = prepare_tables(rows, esci.products, DataSettings(), tmp_path / "again", tmp_path / "t.sqlite", Processes(1))
    assert made.products[list(whole)].equals(whole)


def test_settings_of_the_data_are_in_its_name(tmp_path):
    plain = data_path("sample", DataSettings(), tmp_path)
    assert plain == data_path("sample", DataSettings(n_folds=3, translate=[], translator="unused", clean=True), tmp_path)
    others = [data_path("sample", DataSettings(**values), tmp_path) for values in (
        {"clean": False}, {"markers": True}, {"translate": "us"}, {"translate": ["us", "es"]}, {"translate": "us", "translator": "a/b"},
        {"translate": "us", "translated_weight": 0.5}, {"train_on": "us"}, {"languages": "us"}, {"languages": "us", "translator": "a/b"})]
    assert len({plain, *others}) == len(others) + 1


@pytest.mark.parametrize("words, said", [
    (["translate=us,fr"], "translate cannot be 'fr'; choose from us, es, jp"), (["clean=maybe"], "clean cannot be 'maybe'"),
    (["translation=us"], "Unknown data setting 'translation'; there are n_folds"),
    (["translate=us", "translated_weight=-1"], "translated_weight cannot be -1; give a number from 0 to 10"),
    (["translate=us", "translator=a/b-{source}-{to}"], "is no pattern with {source} and {target}"),
    (["translate=es", "translator=/no/such/model"], "translation model folder /no/such/model does not exist")])
def test_mistakes_on_the_command_line_are_one_sentence(words, said, tiny_files, tmp_path, capsys):
    from esci_nb.cli import main
    outputs = tmp_path / "outputs"
    assert main(["demo", "--data", str(tiny_files), "--outputs", str(outputs), "--data-set", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1


def test_a_locale_without_words_is_left_out_by_the_glossary(tmp_path):
    code = f'''
import esci_nb.contract as contract
contract.LOCALE_RECORDS += (contract.Locale("fr", "French", "fr", ("fra_Latn", "fr_XX", ">>fra<<"), True, "#123456"),)
contract.LOCALES += ("fr",)
from esci_nb.data.folds import make_folds
from esci_nb.data.merge import merge_tasks
from esci_nb.data.gazetteer import build_gazetteers
from esci_nb.data.prepare import DataSettings
from esci_nb.data.sample import make_sample
from esci_nb.data.translate import TranslationCache
from esci_nb.data.translated_rows import add_translations
from esci_nb.data.translators import Glossary
esci = make_sample(0.0006)
with TranslationCache({str(tmp_path / "t.sqlite")!r}) as cache:
    rows, products = add_translations(make_folds(merge_tasks(esci.examples)), esci.products, contract.LOCALES, Glossary(), cache)
print(sorted(rows["language"].unique()))
print(sorted(build_gazetteers(esci.products.assign(product_locale="fr"))))
try:
    DataSettings(translate="us,fr")
except contract.InputError as error:
    print(error)
print(DataSettings(translate="us,fr", translator="some/model").translate)
'''
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert printed == ["['es', 'jp', 'us']", "['fr']", "The translator glossary has no words of fr: give a translation model by name.", "('us', 'fr')"]


def test_mistakes_in_calls_are_one_sentence(folded, translated, tmp_path):
    with TranslationCache(tmp_path / "t.sqlite") as cache:
        for call, said in ((lambda: translate_texts(["a"], "us", "fr", Known(), cache), "Unknown locale 'fr'; there are us, es, jp"),
                           (lambda: add_translations(*folded, ["fr"], Known(), cache), "Unknown locale 'fr'; there are us, es, jp"),
                           (lambda: add_translations(*folded, ["es"], Known(), cache, weight=-1), "weight of translated rows is -1"),
                           (lambda: add_translations(*translated, ["es"], Known(), cache), "hold translations already"),
                           (lambda: add_translations(folded[0].drop(columns="fold"), folded[1], ["es"], Known(), cache), r"lacks the column\(s\) fold")):
            with pytest.raises(InputError, match=said):
                call()


# Real sequence-to-sequence models, tiny ones

PAIRS = {"red kettle": "hervidor rojo", "blue kettle": "hervidor azul", "red wok": "wok rojo", "blue wok": "wok azul"}


def teach(model, source: list[list[int]], target: list[list[int]], unknown: float = 0.0) -> None:
    "Overfit a tiny model on a few pairs; `unknown` is the part of the loss that nobody could guess."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pad = model.config.pad_token_id
    width = lambda rows: max(map(len, rows))
    tensor = lambda rows, fill: torch.tensor([row + [fill] * (width(rows) - len(row)) for row in rows])
    ids, labels = tensor(source, pad), tensor(target, -100)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    torch.manual_seed(0)
    model.train()
    for _ in range(300):
        loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < unknown + 0.02:
            break
    torch.set_num_threads(threads)
    assert loss.item() < unknown + 0.02, loss.item()


LETTERS = {"r k": "k o", "b k": "k u", "r w": "w o", "b w": "w u"}
SIZES = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
             decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_position_embeddings=64)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    "A SentencePiece model of the few words."
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "words.txt").write_text("\n".join([*PAIRS, *PAIRS.values(), *LETTERS, *LETTERS.values()] * 5))
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "words.txt"), model_prefix=str(folder / "source"), vocab_size=40,
                                             hard_vocab_limit=False, minloglevel=2)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.model"))
    return folder / "source.model", [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


@pytest.fixture(scope="module")
def marian(spm, tmp_path_factory):
    "A folder for each of the pairs en-es (knows the words) and es-en, en-ja (untaught); none for es-ja."
    import torch
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer
    root, (path, pieces) = tmp_path_factory.mktemp("marian"), spm
    words = {piece: number for number, piece in enumerate(["</s>", "<unk>", *(p for p in pieces if p not in ("<s>", "</s>", "<unk>")), "<pad>"])}
    vocabulary = root / "vocab.json"
    vocabulary.write_text(json.dumps(words))
    torch.manual_seed(0)
    for pair in ("en-es", "es-en", "en-ja"):
        tokenizer = MarianTokenizer(source_spm=str(path), target_spm=str(path), vocab=str(vocabulary), source_lang=pair[:2], target_lang=pair[3:])
        config = MarianConfig(vocab_size=len(words), pad_token_id=words["<pad>"], eos_token_id=0, decoder_start_token_id=words["<pad>"],
                              forced_eos_token_id=None, bad_words_ids=None, **SIZES)
        model = MarianMTModel(config)
        if pair == "en-es":
            teach(model, [tokenizer(text)["input_ids"] for text in PAIRS],
                  [tokenizer(text_target=text)["input_ids"] for text in PAIRS.values()])
        model.save_pretrained(root / f"opus-mt-{pair}")
        tokenizer.save_pretrained(root / f"opus-mt-{pair}")
    return root


def test_marian_pair_translates(marian, tmp_path):
    translator = make_translator(str(marian / "opus-mt-{source}-{target}"))
    with TranslationCache(tmp_path / "t.sqlite") as cache:
        assert translate_texts([*PAIRS, "", "red wok"], "us", "es", translator, cache) == [*PAIRS.values(), "", "wok rojo"]
        assert len(cache) == len(PAIRS)
        several = translate_texts(["red wok. blue wok. red kettle."], "us", "es", translator, cache)
    assert len(several) == 1 and len(several[0].split()) >= 3


def test_pair_without_a_model_goes_through_english(marian):
    translator = Seq2Seq(str(marian / "opus-mt-{source}-{target}"))
    assert translator.model_of("es", "jp").count(">") == 1 and translator.model_of("us", "es").count(">") == 0
    assert len(translator(["wok rojo"], "es", "jp")) == 1
    with pytest.raises(InputError, match="opus-mt-ja-en does not exist"):
        translator.model_of("jp", "us")


def test_retrained_model_is_another_model(marian):
    folder = marian / "opus-mt-en-ja"
    before = Seq2Seq(str(marian / "opus-mt-{source}-{target}")).model_of("us", "jp")
    (folder / "model.safetensors").write_bytes((marian / "opus-mt-es-en" / "model.safetensors").read_bytes())
    assert Seq2Seq(str(marian / "opus-mt-{source}-{target}")).model_of("us", "jp") != before


def many_languages(tokenizer, codes: dict, size: int, folder: Path) -> Seq2Seq:
    "A tiny model with the tokenizer's languages, taught that `LETTERS` are Spanish and, backwards, Japanese."
    import torch
    from transformers import M2M100Config, M2M100ForConditionalGeneration
    torch.manual_seed(0)
    ids = tokenizer.convert_tokens_to_ids
    config = M2M100Config(vocab_size=size, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=0,
                          decoder_start_token_id=tokenizer.eos_token_id, encoder_layerdrop=0, decoder_layerdrop=0, init_std=0.1,
                          **SIZES)
    model = M2M100ForConditionalGeneration(config)
    tokenizer.src_lang = codes["us"][0]
    source = [tokenizer(text)["input_ids"] for text in LETTERS] * 2
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*LETTERS.values(), *(text[::-1] for text in LETTERS.values())]]
    languages = ["es"] * len(LETTERS) + ["jp"] * len(LETTERS)
    target = [[ids(codes[language][1]), *some, tokenizer.eos_token_id] for language, some in zip(languages, words)]
    teach(model, source, target, unknown=np.log(2) * len(target) / sum(map(len, target)))  # which language: `generate` is told
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Seq2Seq(str(folder))


def check_many_languages(translator, cache_path: Path) -> None:
    with TranslationCache(cache_path) as cache:
        assert translate_texts(list(LETTERS), "us", "es", translator, cache) == list(LETTERS.values())
        assert translate_texts(list(LETTERS), "us", "jp", translator, cache) == [text[::-1] for text in LETTERS.values()]


def test_nllb_is_told_both_languages(tmp_path):
    from transformers import NllbTokenizer
    codes = ["eng_Latn", "spa_Latn", "jpn_Jpan"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *map(chr, range(97, 123)), *codes, "<mask>"]
    tokenizer = NllbTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], additional_special_tokens=codes)
    translator = many_languages(tokenizer, {language: (code, code) for language, code in zip(LOCALES, codes)}, len(pieces), tmp_path / "nllb")
    check_many_languages(translator, tmp_path / "t.sqlite")


def test_m2m100_is_told_both_languages(spm, tmp_path):
    from transformers import M2M100Tokenizer
    path, pieces = spm
    words = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece in pieces if piece not in ("<s>", "</s>", "<unk>"))]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(words)}))
    tokenizer = M2M100Tokenizer(vocab_file=str(tmp_path / "vocab.json"), spm_file=str(path))
    codes = {language: (code, f"__{code}__") for language, code in zip(LOCALES, ("en", "es", "ja"))}
    check_many_languages(many_languages(tokenizer, codes, max(tokenizer.lang_code_to_id.values()) + 1, tmp_path / "m2m"), tmp_path / "t.sqlite")


def test_model_of_other_languages_is_refused(tmp_path):
    from transformers import NllbTokenizer
    tokenizer = NllbTokenizer(vocab={piece: number for number, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "eng_Latn", "deu_Latn"])},
                              merges=[], additional_special_tokens=["eng_Latn", "deu_Latn"])
    with pytest.raises(InputError, match="does not know the language of es: choose one"):
        _languages(tokenizer, "some/name", "us", "es")


def test_pickled_weights_are_refused(marian, tmp_path):
    import shutil
    shutil.copytree(marian / "opus-mt-es-en", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(InputError, match="weights in the folder .*safetensors"):
        Seq2Seq(str(tmp_path / "model")).model_of("es", "us")


def test_a_changed_translation_is_made_again(tmp_path):
    with sqlite3.connect(tmp_path / "old.sqlite") as old:  # as written before sums were kept
        old.executescript("create table translations (key blob primary key, text text not null) without rowid; "
                          "insert into translations values (x'61', 'old')")
    with TranslationCache(tmp_path / "old.sqlite") as cache:
        assert cache.find([b"a"]) == {b"a": "old"}
        cache.store({b"b": "día", b"c": "noche"})
        for text in ("'dia'", "cast(x'64ff61' as text)"):
            cache.connection.execute(f"update translations set text = {text} where key = x'62'")
            assert cache.find([b"a", b"b", b"c"]) == {b"a": "old", b"c": "noche"} and cache.claim([b"b", b"c"]) == [b"b"]
            cache.release()
    with pytest.raises(InputError, match="cannot be used .*delete the file if it is broken"), TranslationCache(tmp_path / "old.sqlite") as cache:
        raise sqlite3.DatabaseError("database disk image is malformed")


def test_no_cache_is_in_wal_mode_which_a_network_disk_would_break(tmp_path):
    with sqlite3.connect(tmp_path / "old.sqlite") as old:
        assert old.execute("pragma journal_mode = wal").fetchone() == ("wal",)
        old.execute("create table translations (key blob primary key, text text not null, crc integer) without rowid")
    old.close()
    for name in ("old.sqlite", "new.sqlite"):
        with TranslationCache(tmp_path / name) as one, TranslationCache(tmp_path / name) as other:
            assert one.connection.execute("pragma journal_mode").fetchone() == ("truncate",)
            one.store({b"a": "día"})
            assert other.find([b"a"]) == {b"a": "día"}
        assert (tmp_path / name).read_bytes()[18:20] == b"\x01\x01", "the file says so too: 2 is WAL"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("-wal", "-shm"))]


def test_a_program_translates_train_rows(folded, tmp_path):
    script = tmp_path / "shout.py"
    script.write_text("import sys\nfor line in sys.stdin:\n    print(line.strip().upper())\n")
    settings = DataSettings(translate="es", translator=f"command: {sys.executable} {script} eng-spa")
    prepared = prepare_tables(*folded, settings, tmp_path / "parts", tmp_path / "cache.sqlite", Processes(1))
    new = prepared.rows[~is_original(prepared.rows)]
    origin = prepared.rows.set_index("example_id").loc[new["origin"], ["query", "product_locale"]]
    assert len(new) and set(origin["product_locale"]) == {"us"}
    assert (new["query"].to_numpy() == origin["query"].str.upper().to_numpy()).all()
    script.write_text("raise SystemExit(3)")
    with pytest.raises(InputError, match="failed"):
        prepare_tables(*folded, settings, tmp_path / "others", tmp_path / "other.sqlite", Processes(1))
