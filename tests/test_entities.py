"""Entity and field markers: exact stripping, boundaries, ambiguous words, the token budget, a run with markers."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from esci_nb.contract import LABELS, TEXT_FIELDS, InputError
from esci_nb.data import entities
from esci_nb.data.entities import mark_table, mark_texts, tag_texts
from esci_nb.data.gazetteer import build_gazetteer, build_gazetteers
from esci_nb.data.markers import ENTITY_TYPES, MARKED_FIELDS, MARKERS, SPECIAL_TOKENS, strip_markers, strip_table
from esci_nb.hub import load_tokenizer, quiet
from esci_nb.model.encode import EncodedPairs, add_markers, marker_tokens, product_text, tokenizer_hash

BRANDS = {"us": ("Zorvik", "Tamsin & Roe", "O'Vela", "Apple"), "es": ("Peñalba", "Luzarro", "Olmedal"), "jp": ("ソニア(SONIA)", "任天社", "花丸")}
COLOURS = {"us": ("Black", "Orange", "Navy/White"), "es": ("Púrpura", "Negro"), "jp": ("黒", "ブルー")}


def catalogue() -> pd.DataFrame:
    "Products of three locales; every colour is used by every brand."
    rows = [(f"{locale}{number}{copy}", locale, f"{brand} thing {colour} {copy}", brand, colour)
            for locale in BRANDS for number, (brand, colour) in enumerate((b, c) for b in BRANDS[locale] for c in COLOURS[locale])
            for copy in range(2)]
    table = pd.DataFrame(rows, columns=["product_id", "product_locale", "product_title", "product_brand", "product_color"])
    extra = table.iloc[:3].assign(product_id=["x", "y", "z"], product_brand=["NewName", "NewName", "NewName"], product_color="Black")
    return pd.concat([table, extra], ignore_index=True).assign(product_bullet_point="", product_description="")


GAZETTEERS = build_gazetteers(catalogue())
PIECES = st.sampled_from([*SPECIAL_TOKENS, "⟦", "⟧", "\u200b", " ", "  ", "\n", "\t", "/", "-", "'", "Zorvik", "tamsin & roe", "O'Vela", "orange", "navy",
                          "ソニア", "任天社", "黒", "ブルー", "12", "1.7 L", "pack of 3", "QX-4821", "x", "İ", "ß", "é", "e\u0301", "\ud800", "🔥", "\x00", "龍"])
TEXTS = st.one_of(st.text(st.characters(exclude_categories=()), max_size=40), st.lists(PIECES, max_size=14).map("".join))


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), locale=st.sampled_from(sorted(GAZETTEERS)), own=st.sampled_from(["", "Zorvik", "黒", "orange"]))
def test_stripping_gives_the_text_back(texts, locale, own):
    for marked in (mark_texts(texts, GAZETTEERS[locale]), mark_texts(texts, GAZETTEERS[locale], [own] * len(texts), [own] * len(texts))):
        assert [strip_markers(text) for text in marked] == texts
        assert all(text.count(before) == text.count(after) for text in marked for before, after in MARKERS.values())


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_a_text_is_marked_the_same_in_any_company(texts):
    assert mark_texts(texts, GAZETTEERS["us"]) == [mark_texts([text], GAZETTEERS["us"])[0] for text in texts]


@settings(max_examples=40, deadline=None)
@given(values=st.lists(TEXTS.map(lambda text: text.encode("utf-8", "ignore").decode()), min_size=3, max_size=3))  # a table holds UTF-8
def test_tables_are_given_back(values):
    products = catalogue().iloc[:3].assign(product_title=values, product_brand=values[::-1], product_color=values)
    rows = pd.DataFrame({"query": values, "product_locale": ["us", "es", "jp"]}, index=[4, 2, 9])
    marked_rows, marked_products = mark_table(rows, products, GAZETTEERS)
    assert strip_table(marked_rows)["query"].tolist() == values and marked_rows.index.equals(rows.index)
    assert all(strip_table(marked_products)[name].tolist() == products[name].tolist() for name in MARKED_FIELDS)
    assert marked_products["product_description"].equals(products["product_description"])


@pytest.mark.parametrize("locale, text, expected", [
    ("us", "zorvik case", "⟦brand⟧ zorvik ⟦/brand⟧ case"), ("us", "ZORVIKS", "ZORVIKS"), ("us", "azorvik", "azorvik"),
    ("us", "(Zorvik)", "(⟦brand⟧ Zorvik ⟦/brand⟧)"), ("us", "ovela mug", "⟦brand⟧ ovela ⟦/brand⟧ mug"),
    ("us", "Tamsin and Roe", "⟦brand⟧ Tamsin and Roe ⟦/brand⟧"), ("us", "navy rug", "⟦colour⟧ navy ⟦/colour⟧ rug"),
    ("us", "zorvik 12 W", "⟦brand⟧ zorvik ⟦/brand⟧ ⟦quantity⟧ 12 W ⟦/quantity⟧"), ("us", "size 8 qx-4821", "⟦quantity⟧ size 8 ⟦/quantity⟧ ⟦model⟧ qx-4821 ⟦/model⟧"),
    ("es", "peñalba purpura", "⟦brand⟧ peñalba ⟦/brand⟧ ⟦colour⟧ purpura ⟦/colour⟧"), ("es", "penalba", "penalba"), ("es", "talla 38", "⟦quantity⟧ talla 38 ⟦/quantity⟧"),
    ("jp", "ソニア製", "⟦brand⟧ ソニア ⟦/brand⟧製"), ("jp", "ソニアン", "ソニアン"), ("jp", "sonia", "⟦brand⟧ sonia ⟦/brand⟧"),
    ("jp", "任天社純正", "⟦brand⟧ 任天社 ⟦/brand⟧純正"), ("jp", "黒板", "黒板"), ("jp", "黒 2本入", "⟦colour⟧ 黒 ⟦/colour⟧ ⟦quantity⟧ 2本入 ⟦/quantity⟧"),
    ("jp", "ブルーレイ", "ブルーレイ")])
def test_boundaries(locale, text, expected):
    assert mark_texts([text], GAZETTEERS[locale]) == [expected]


def test_ambiguous_words():
    def some(title, brand, colour, bullet=""):
        return [(f"{title} {number}", brand, colour, bullet) for number in range(6)]

    products = pd.DataFrame([
        *some("Apple watch", "Apple", "Silver"), *some("Fresh apple rings", "Sourly", "", "like an apple, or one apple more"),
        *some("Orange shirt", "A-one", "Orange"), *some("Orange shirt", "B-two", "Orange"), *some("Orange scarf", "C-three", "Orange"),
        *some("Orange juice", "Sourly", "Clear"), *some("Case for Nameo", "C-three", "Clear", "For Nameo."), *some("Nameo phone", "Nameo", "")],
        columns=["product_title", "product_brand", "product_color", "product_bullet_point"]).assign(product_locale="us")
    marks = lambda text: mark_texts([text], build_gazetteer(products, "us"))[0]
    assert marks("apple watch band") == "⟦brand⟧ apple ⟦/brand⟧ watch band"
    assert marks("apple") == "apple" and marks("rings of apple") == "rings of apple"
    assert marks("orange hat") == "⟦colour⟧ orange ⟦/colour⟧ hat" and marks("orange juice") == "orange juice"
    assert marks("nameo") == "⟦brand⟧ nameo ⟦/brand⟧"
    own = mark_texts(["Apple pie"], build_gazetteer(products, "us"), ["Apple"], [""])
    assert own == ["⟦brand⟧ Apple ⟦/brand⟧ pie"], "the product's own column says so"


def test_two_processes_mark_alike(monkeypatch):
    monkeypatch.setattr(entities, "chunk_slices", lambda texts, size=100: [slice(first, first + size) for first in range(0, len(texts), size)])
    texts = [f"zorvik {number} W navy" for number in range(500)]
    assert mark_texts(texts, GAZETTEERS["us"], workers=2) == mark_texts(texts, GAZETTEERS["us"])


def test_bad_input():
    rows = pd.DataFrame({"query": ["a"], "product_locale": ["fr"]})
    with pytest.raises(InputError, match="no gazetteer for the locale.* fr, only for es, jp, us"):
        mark_table(rows, catalogue(), GAZETTEERS)
    with pytest.raises(InputError, match=r"lacks the column\(s\) product_brand"):
        build_gazetteer(catalogue().drop(columns="product_brand"), "us")
    with pytest.raises(InputError, match="does not exist"):
        tag_texts(["a"], "/no/such/tagger")
    empty = mark_texts(["Zorvik 12 W"], build_gazetteer(catalogue().iloc[:0], "us"))
    assert empty == ["Zorvik ⟦quantity⟧ 12 W ⟦/quantity⟧"]


def word_tokenizer(words, extra=()) -> PreTrainedTokenizerFast:
    "A word-level tokenizer with BERT's frame."
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                       special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
                                   model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def test_tagger_built_here(tmp_path):
    "A model that says ORG for one word: all zero but the embedding of `Sonaria` and the row of the label."
    tokenizer = word_tokenizer(["red", "lamp", "Sonaria"])
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                        id2label={0: "O", 1: "B-ORG"}, label2id={"O": 0, "B-ORG": 1})
    with quiet():
        model = BertForTokenClassification(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
            model.bert.embeddings.word_embeddings.weight[6] = torch.tensor([1.0, -1] * 4)
            model.classifier.weight[1] = torch.tensor([1.0, -1] * 4)
            model.classifier.bias[0] = 1.0
        model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["red lamp", "lamp Sonaria red"]
    spans = tag_texts(texts, str(tmp_path))
    assert spans.tolist() == [[1, 5, 12, ENTITY_TYPES.index("brand")]]
    assert mark_texts(texts, GAZETTEERS["us"], tagged=spans) == ["red lamp", "lamp ⟦brand⟧ Sonaria ⟦/brand⟧ red"]
    rows = pd.DataFrame({"query": texts, "product_locale": "us"})
    assert mark_table(rows, catalogue(), GAZETTEERS, tagger=str(tmp_path))[0]["query"][1] == "lamp ⟦brand⟧ Sonaria ⟦/brand⟧ red"
    with pytest.raises(InputError, match="knows the labels ORG, none of which"):
        tag_texts(texts, str(tmp_path), types={"PER": "brand"})


WORDS = [f"w{number}" for number in range(30)]


@settings(max_examples=40, deadline=None)
@given(query=st.lists(st.sampled_from([*WORDS, "⟦brand⟧ w1 ⟦/brand⟧", "⟦quantity⟧ w2 w3 ⟦/quantity⟧"]), min_size=1, max_size=12),
       title=st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), max_length=st.integers(24, 48), fields=st.booleans())
def test_the_query_is_never_cut(tmp_path_factory, query, title, max_length, fields):
    tokenizer = add_markers(word_tokenizer(WORDS), marker_tokens(fields, SPECIAL_TOKENS))
    rows = pd.DataFrame({"query": [" ".join(query)], "product_id": ["a"], "product_locale": ["us"]})
    products = pd.DataFrame({"product_id": ["a"], "product_locale": ["us"], "product_title": [" ".join(title)], "product_brand": ["⟦brand⟧ w1 ⟦/brand⟧"]})
    pairs = EncodedPairs(rows, products, tokenizer, ["product_title", "product_brand"], max_length, tmp_path_factory.mktemp("tokens"), fields, SPECIAL_TOKENS)
    batch = pairs.__getitems__([0])
    kept = tokenizer.decode(batch["input_ids"][0][batch["token_type_ids"][0] == 0]).split()
    plain = strip_markers(rows["query"][0]).split()
    if len(plain) + 1 <= max_length - 4:
        assert [word for word in kept if word in WORDS] == plain
    assert len(batch["input_ids"][0]) == pairs.lengths[0] <= max_length and (batch["token_type_ids"][0] == 1).sum() >= 2
    assert not fields or kept[1] == "[QUERY]"


def test_field_markers_keep_the_short_fields():
    products = catalogue().iloc[:1].assign(product_bullet_point="long", product_description="longer")
    shuffled = ("product_description", "product_color", "product_bullet_point", "product_title")
    assert product_text(products, shuffled, True).iloc[0].startswith("[TITLE] ")
    marks = [word for word in product_text(products, TEXT_FIELDS, True).iloc[0].split() if word.startswith("[")]
    assert marks == ["[TITLE]", "[BRAND]", "[COLOR]", "[BULLET]", "[DESCRIPTION]"]
    with pytest.raises(InputError, match="no field marker for product_id"):
        product_text(products, ["product_id"], True)
    with pytest.raises(InputError, match="does not know the markers"):
        EncodedPairs(products, products, word_tokenizer([]), TEXT_FIELDS, 16, "nowhere", True)


def test_markers_in_a_tokenizer(tmp_path):
    plain, marked = word_tokenizer(WORDS), add_markers(word_tokenizer(WORDS), marker_tokens(True, SPECIAL_TOKENS))
    assert tokenizer_hash(plain) != tokenizer_hash(marked)
    assert tokenizer_hash(add_markers(marked, SPECIAL_TOKENS)) == tokenizer_hash(marked), "adding twice changes nothing"
    marked.save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(again) == tokenizer_hash(marked)
    ids = again("w1 ⟦brand⟧ w2 ⟦/brand⟧ w3", add_special_tokens=False)["input_ids"]
    assert again.convert_ids_to_tokens(ids) == ["w1", "⟦brand⟧", "w2", "⟦/brand⟧", "w3"]
    assert marker_tokens(False) == () and len(marker_tokens(True, SPECIAL_TOKENS)) == 14


def test_a_run_with_markers(tmp_path):
    from esci_nb.model.backbones import load_backbone
    from esci_nb.model.cross_encoder import load_model, save_model
    from esci_nb.model.losses import one_hot_targets
    from esci_nb.recipe import make_run
    from esci_nb.strategy.base import TrainingRows
    from esci_nb.train.fit import fit, predict, widen_embeddings
    tokenizer = word_tokenizer([*WORDS, "brand"])
    with quiet():
        BertModel(BertConfig(vocab_size=35, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
                  add_pooling_layer=False).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    rows = pd.DataFrame({"query": ["⟦brand⟧ w1 ⟦/brand⟧ w2"] * 8, "product_id": list("abcdefgh"), "product_locale": "us"})
    products = rows[["product_id", "product_locale"]].assign(product_title="w3", product_brand="⟦brand⟧ w1 ⟦/brand⟧")
    marked = add_markers(load_tokenizer(str(tmp_path / "backbone")), SPECIAL_TOKENS)
    pairs = EncodedPairs(rows, products, marked, ["product_title", "product_brand"], 24, tmp_path / "tokens", False, SPECIAL_TOKENS)
    backbone = load_backbone(str(tmp_path / "backbone"))
    widen_embeddings(backbone, dict(pairs.markers.values()))
    weight = backbone.get_input_embeddings().weight
    number = marked.convert_tokens_to_ids("⟦/brand⟧")
    assert torch.equal(weight[number], weight[marked.convert_tokens_to_ids("brand")]) and len(weight) == len(marked)
    run = make_run(backbone=str(tmp_path / "backbone"), epochs=1, max_length=24, precision="fp32", lr=1e-3)
    labels = one_hot_targets(pd.Series([LABELS[0], LABELS[-1]] * 4))
    fitted = fit(run, pairs, TrainingRows(np.arange(8), labels, np.ones(8, np.float32)), tmp_path / "run")
    save_model(fitted.model, tmp_path / "model", marked)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == len(marked)
    loaded = load_model(tmp_path / "model")
    first, second = (predict(model, pairs, np.arange(8)) for model in (fitted.model, loaded))
    assert np.array_equal(first, second) and first.shape == (8, len(LABELS))
    # a second round on the saved backbone keeps what the markers have learnt
    with quiet():
        fitted.model.backbone.save_pretrained(tmp_path / "again")
    marked.save_pretrained(tmp_path / "again")
    known = load_tokenizer(str(tmp_path / "again")).get_vocab()
    assert all(token in known for token in pairs.markers)
