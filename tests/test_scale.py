"""The data path at catalogue size: token ids by words, parts, a killed measurement, and mistakes in one sentence."""
import json

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from esci_nb.cli import main
from esci_nb.contract import TEXT_FIELDS
from esci_nb.data.load import load
from esci_nb.model.encode import _find_keys, add_markers, product_text, tokenize_texts, words_stand_alone
from esci_nb.data.markers import SPECIAL_TOKENS

PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789", "電", "気", "ケ", "ト", "ル", "th", "er", "in", "an"]


def fast(tokenizer, normalizer, pre_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                  special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PIECES, *(f"##{piece}" for piece in PIECES), *",.|-/()"]
    return fast(Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")), normalizers.BertNormalizer(),
                pre_tokenizers.BertPreTokenizer())


def unigram(scheme: str, split: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = [("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("▁", -3.0), *((piece, -4.0 - len(piece)) for piece in PIECES)]
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return fast(Tokenizer(models.Unigram(vocabulary, unk_id=1)), normalizers.NFKC(),
                pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace]) if split else metaspace)


@pytest.fixture(scope="module")
def esci(tiny_files):
    return load(tiny_files)


@pytest.mark.parametrize("make", [wordpiece, lambda: unigram("always")], ids=["wordpiece", "unigram"])
@pytest.mark.parametrize("most", [7, 512])
def test_ids_by_words_are_the_tokenizers_own(make, most, esci, tmp_path):
    tokenizer = add_markers(make(), SPECIAL_TOKENS)
    assert words_stand_alone(tokenizer)
    marked = [f"{SPECIAL_TOKENS[0]} Zorvik {SPECIAL_TOKENS[1]} kettle", f"a{SPECIAL_TOKENS[0]}b", "", "x", "e\u0301 \u0301e 電気ケトル 1.7L", "w" * 300]
    texts = pd.Series([*marked, *product_text(esci.products, TEXT_FIELDS)])
    store = tokenize_texts(tokenizer, texts, tmp_path / "words", most, chunk=200)
    plain = tokenizer(texts.tolist(), add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
    assert len(store) == len(plain) and all(store[i].tolist() == ids for i, ids in enumerate(plain))


def test_words_that_lean_on_others_are_tokenised_in_their_text(tmp_path):
    for tokenizer in (unigram("first"), unigram("never", split=False)):
        assert not words_stand_alone(tokenizer)
        texts = ["the red kettle", "red", ""]
        store = tokenize_texts(tokenizer, texts, tmp_path / str(id(tokenizer)))
        assert [store[i].tolist() for i in range(3)] == tokenizer(texts, add_special_tokens=False)["input_ids"]
    spaced = wordpiece()
    spaced.add_tokens(["red kettle"])
    assert not words_stand_alone(spaced)


def test_joined_text_is_tidy_whatever_the_space(esci):
    odd = esci.products.head(6).assign(product_title=["a\u3000b \x1c c", "  x ", "\ty\n", "a\xa0b", "", "\u2009z  z"])
    expected = [" ".join(" ".join(row[field] for field in TEXT_FIELDS).split()) for _, row in odd.iterrows()]
    assert product_text(odd, TEXT_FIELDS).tolist() == expected
    assert product_text(odd.iloc[[3]], TEXT_FIELDS).index.tolist() == odd.index[[3]].tolist()


def test_keys_are_found_by_locale(esci):
    products = esci.products
    rows = products.iloc[[5, 0, 2]][["product_id", "product_locale"]]
    other = rows.assign(product_locale="xx")
    assert _find_keys(rows, products).tolist() == [5, 0, 2] and (_find_keys(other, products) == -1).all()


def test_scale_is_measured_killed_and_resumed(tmp_path, capsys):
    backbone = tmp_path / "backbone"
    wordpiece().save_pretrained(backbone)
    (backbone / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert main(["scale", "--scales", "0.0006", "--backbone", str(backbone), "--work", str(tmp_path / "work"), "--to", str(tmp_path / "scale.csv")]) == 0
    table = pd.read_csv(tmp_path / "scale.csv").set_index("what")
    assert "rows_per_s" in capsys.readouterr().out
    assert table.loc["killed while cleaning, resumed", "identical"] in (True, "True")
    steps = table.loc[["load", "merge", "clean", "mark", "write", "tokenise"]]
    assert np.isclose(steps["seconds"].astype(float).sum(), table.loc["all steps", "seconds"], rtol=1e-3)
    assert (steps["peak_gib"].astype(float) > 0.05).all() and table.loc["clean", "ratio"] > 0 and table.loc["tokenise", "plain_rows_per_s"] > 0


@pytest.mark.parametrize("words, said", [(["--scales", "2"], "scale 2.0 is outside"), (["--scales", "0"], "'0' is no number from 1e-05 to 10")])
def test_mistakes_are_one_sentence(words, said, tmp_path, capsys):
    assert main(["scale", *words, "--to", str(tmp_path / "scale.csv")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "scale.csv").exists()
