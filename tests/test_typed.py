"""Special tokens that somebody typed into a query or a title stay text, in every family of tokenizers."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from esci_nb.contract import TEXT_FIELDS
from esci_nb.data.entities import mark_table
from esci_nb.data.markers import SPECIAL_TOKENS, strip_table
from esci_nb.model.encode import EncodedPairs, add_markers, marker_tokens, token_ids, words_stand_alone
from esci_nb.model.encode import _plain_ids, _token_ids_by_words  # what the public functions must agree with

WORDS = "red running shoes for women size nine brand title cls sep mask pad unk s zapatilla roja ケトル <b> / [x]".split()
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
XLMR = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": AddedToken("<mask>", lstrip=True, special=True)}


def word_piece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(WORDS, trainers.WordPieceTrainer(special_tokens=list(BERT.values()), vocab_size=120))
    return framed(raw, "[CLS]", "[SEP]", BERT)


def unigram(names=XLMR, cls="<s>", sep="</s>") -> PreTrainedTokenizerFast:
    "As XLM-R: the special tokens are pieces of the model with the best score, and NFKC makes them from other letters."
    special = [str(name) for name in names.values()]
    letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
    pieces = [*((token, 0.0) for token in special), *((f"▁{word}", -3.0) for word in WORDS), *((letter, -8.0) for letter in letters)]
    raw = Tokenizer(models.Unigram(pieces, special.index(str(names["unk_token"])), byte_fallback=False))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    return framed(raw, cls, sep, names)


def byte_pairs() -> PreTrainedTokenizerFast:
    names = {name: str(token).upper() if name == "mask_token" else token for name, token in XLMR.items()}
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(WORDS, trainers.BpeTrainer(special_tokens=list(names.values()), vocab_size=400,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return framed(raw, "<s>", "</s>", names)


def framed(raw: Tokenizer, cls: str, sep: str, names: dict) -> PreTrainedTokenizerFast:
    raw.post_processor = processors.TemplateProcessing(single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1",
                                                       special_tokens=[(token, raw.token_to_id(token)) for token in (cls, sep)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


FAMILIES = {"WordPiece": word_piece, "Unigram": unigram, "byte pairs": byte_pairs, "Unigram with brackets": lambda: unigram(BERT, "[CLS]", "[SEP]")}
MADE = {name: make() for name, make in FAMILIES.items()}


def controls(tokenizer) -> list[int]:
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


PIECES = st.sampled_from([*(str(token) for token in (*BERT.values(), *XLMR.values(), "<MASK>")), "＜/s＞", "［SEP］", "<", "/s>", "[", "SEP]", "[sep]", " ", "  ",
                          "red", "shoes", "ケトル", "[[SEP]", "<s<s>>", "é", "\u200b"])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=4))
def test_no_text_gives_a_control_token(family, texts):
    tokenizer = MADE[family]
    ids, counts = token_ids(tokenizer, texts, 64)
    assert not np.isin(ids, controls(tokenizer)).any() and len(counts) == len(texts) and counts.sum() == len(ids)
    if words_stand_alone(tokenizer):
        assert not np.isin(_token_ids_by_words(tokenizer, texts, 64)[0], controls(tokenizer)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_texts_keep_their_tokens(family):
    tokenizer = MADE[family]
    texts = ["red running shoes", "", "[x] zapatilla <b> / roja", "ケトル size 9", "[SE P] < / s >", "unk 漢"]
    for plain, kept in zip(_plain_ids(tokenizer, texts, 8), token_ids(tokenizer, texts, 8)):
        assert plain.tolist() == kept.tolist()
    mixed = token_ids(tokenizer, [*texts, f"a{tokenizer.sep_token}b"], 8)
    assert mixed[0][:mixed[1][:-1].sum()].tolist() == _plain_ids(tokenizer, texts, 8)[0].tolist()


def test_the_typed_token_for_unknown_words_is_text():
    tokenizer = MADE["WordPiece"]
    assert tokenizer.unk_token_id not in token_ids(tokenizer, ["red [UNK]"], None)[0]
    assert tokenizer.unk_token_id in token_ids(tokenizer, ["red 漢"], None)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field_markers", [False, True])
@pytest.mark.parametrize("entity_markers", [(), SPECIAL_TOKENS])
@pytest.mark.parametrize("knows_all", [False, True])
def test_pairs_hold_only_the_markers_that_we_put_there(family, field_markers, entity_markers, knows_all, tmp_path):
    tokenizer = add_markers(FAMILIES[family](), marker_tokens(True, SPECIAL_TOKENS) if knows_all else marker_tokens(field_markers, entity_markers))
    typed = " ".join([*marker_tokens(True, SPECIAL_TOKENS), str(tokenizer.sep_token), str(tokenizer.mask_token)])
    rows = pd.DataFrame({"query": [f"shoes {typed}"], "product_id": ["1"], "product_locale": "us"})
    products = pd.DataFrame({"product_id": ["1"], "product_locale": "us"}).assign(**dict.fromkeys(TEXT_FIELDS, f"red {typed}"))
    own = 0
    if entity_markers:
        marked_rows, marked = mark_table(rows, products)
        assert strip_table(marked).equals(products.assign(**{field: products[field].astype("str") for field in TEXT_FIELDS}))
        own = sum(marked[field][0].count(token) for field in TEXT_FIELDS for token in SPECIAL_TOKENS) + sum(marked_rows["query"][0].count(token) for token in SPECIAL_TOKENS)
        rows, products = marked_rows, marked
    pairs = EncodedPairs(rows, products, tokenizer, TEXT_FIELDS, 4000, tmp_path, field_markers, entity_markers)
    ids = pairs.__getitems__([0])["input_ids"][0].tolist()
    markers = set(tokenizer.convert_tokens_to_ids([token for token in marker_tokens(True, SPECIAL_TOKENS) if token in tokenizer.get_vocab()]))
    assert sum(number in markers for number in ids) == own + field_markers * (1 + len(TEXT_FIELDS))
    assert ids.count(tokenizer.sep_token_id) == 2 and tokenizer.mask_token_id not in ids and ids.count(tokenizer.cls_token_id) == 1
