"""Every family of the backbone list goes the whole way as a tiny random model: encode, train, save, load, predict.

What a family names differently (layers, embeddings, norms, dropouts, tokens, segments, positions) is found here.
"""
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from esci_nb.contract import LABELS, LOCALE_RECORDS, InputError
from esci_nb.data.load import load
from esci_nb.data.merge import merge_tasks
from esci_nb.hub import load_tokenizer, quiet
from esci_nb.model.backbones import BACKBONES, attention_kinds, load_backbone, parameter_count, position_limit, uses_segments
from esci_nb.model.cross_encoder import CrossEncoder, layer_weights, load_model, pool, save_model
from esci_nb.model.encode import EncodedPairs, PairFrame
from esci_nb.model.engines import CpuEngine
from esci_nb.model.layer_rates import find_layers, parameter_groups, rate_table
from esci_nb.model.losses import soft_cross_entropy
from esci_nb.recipe import POOLINGS, WINNER_QUARTERS, make_recipe
from esci_nb.strategy.adversarial import AWP, FGM
from esci_nb.strategy.base import Forward
from esci_nb.strategy.multi_sample import MultiSampleDropout
from esci_nb.train.fit import predict

FIELDS = ("product_title", "product_brand")
MAX_LENGTH = 24


@dataclass(frozen=True)
class Family:
    "How to build a tiny model of a family and a tokenizer with its frame; and what must come of it."
    config: dict                  # beside the sizes that all share
    special: tuple[str, ...]      # padding, unknown, first, between, last; the padding token's id is its config's
    pair: str                     # template of a pair
    segments: bool                # the tokenizer offers segments
    reserved: int | None          # positions that cannot be used; None: any length works
    embeddings: tuple[str, ...]   # parameters of the backbone that belong to the embeddings
    top: tuple[str, ...] = ()     # parameters after the last layer


BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
NORM = ("embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
TABLES = tuple(f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
FAMILIES = {
    "bert": Family({}, BERT, "[CLS] $A [SEP] $B:1 [SEP]:1", True, 0, TABLES + NORM),
    "xlm-roberta": Family({"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, ROBERTA,
                          "<s> $A </s> </s> $B </s>", False, 2, TABLES + NORM),
    "rembert": Family({"input_embedding_size": 8, "bos_token_id": 2, "eos_token_id": 3}, BERT,
                      "[CLS] $A [SEP] $B:1 [SEP]:1", False, 0,
                      (*TABLES, *NORM, "encoder.embedding_hidden_mapping_in.weight",
                       "encoder.embedding_hidden_mapping_in.bias")),
    "deberta-v2": Family(BACKBONES["microsoft/deberta-v3-large"].shape | {"position_buckets": 4}, BERT,
                         "[CLS] $A [SEP] $B:1 [SEP]:1", True, None,
                         ("embeddings.word_embeddings.weight", *NORM, "encoder.rel_embeddings.weight",
                          "encoder.LayerNorm.weight", "encoder.LayerNorm.bias")),
    "modernbert": Family({"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
                          "pad_token_id": 0}, BERT, "[CLS] $A [SEP] $B [SEP]", False, None,
                         ("embeddings.tok_embeddings.weight", "embeddings.norm.weight"), ("final_norm.weight",)),
    "eurobert": Family({"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "mask_token_id": 1}, BERT,
                       "[CLS] $A [SEP] $B [SEP]", False, None, ("embed_tokens.weight",), ("norm.weight",)),
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 32}


def tiny_tokenizer(family: Family, texts: list[str]) -> PreTrainedTokenizerFast:
    "A word tokenizer over `texts` with the family's special tokens and its frame around a pair."
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text.lower())})
    ids = {token: number for number, token in enumerate([*family.special, *words])}
    unknown = next(token for token in family.special if "unk" in token.lower())
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    used = {token: ids[token] for token in re.findall(r"\[\w+\]|</?s>", family.pair)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=family.pair.split(" $B")[0], pair=family.pair, special_tokens=list(used.items()))
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * family.segments
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, model_input_names=inputs,
                                   pad_token=next(token for token in family.special if "pad" in token.lower()))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Matrices this small only wait for a second thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tiny_files):
    "A handful of pairs with their products."
    esci = load(tiny_files)
    rows = merge_tasks(esci.examples)
    return rows[rows["esci_label"].isin(LABELS)].head(24).reset_index(drop=True), esci.products


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, data, tmp_path_factory):
    "Name, family, the folder of its tiny backbone as a download would look, and its encoded pairs."
    name, family, (rows, products) = request.param, FAMILIES[request.param], data
    folder = tmp_path_factory.mktemp(name)
    needed = products.merge(rows[["product_id", "product_locale"]].drop_duplicates())
    tokenizer = tiny_tokenizer(family, [*rows["query"], *needed["product_title"], *needed["product_brand"]])
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **family.config | SIZES | {"vocab_size": len(tokenizer)})
    with quiet():
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = EncodedPairs(rows, products, load_tokenizer(str(folder)), FIELDS, MAX_LENGTH, folder / "tokens")
    return name, family, folder, pairs


def branches_loss(model: CrossEncoder, batch: dict, target: torch.Tensor, branches: int = 3) -> torch.Tensor:
    "The loss over several dropout masks of the pooled vectors."
    forward = Forward(model, lambda: model.vectors(**batch), target, torch.ones(len(target)))
    return MultiSampleDropout(branches).loss(forward.loss, forward)


def train_step(model: CrossEncoder, batch: dict, target: torch.Tensor) -> float:
    "One optimizer step with all that the model and the optimizer have to offer; the loss before it."
    groups = parameter_groups(model, lr=1e-2, head_lr=2e-2, weight_decay=0.01, quarters=WINNER_QUARTERS)
    optimizer = torch.optim.AdamW(groups)
    logits = model.train()(**batch)
    assert logits.shape == (len(target), len(LABELS))
    assert soft_cross_entropy(logits, target, torch.ones(len(target))).isfinite()
    assert model.classify(model.vectors(**batch).expand(3, -1, -1)).shape == (3, len(target), len(LABELS))
    loss = branches_loss(model, batch, target)
    loss.backward()
    for adversary in (FGM(model), AWP(model, below=100)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with adversary.attack(lambda: branches_loss(model, batch, target).backward()):
            branches_loss(model, batch, target).backward()
        assert adversary.attacks == 1
        assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient: {without}"
    optimizer.step()
    return loss.item()


def batch_of(pairs: EncodedPairs) -> dict:
    "All pairs as one batch."
    batch = pairs.__getitems__(np.arange(len(pairs)))
    del batch["row"]
    return batch


def test_the_list_has_no_untested_family():
    assert {backbone.family for backbone in BACKBONES.values()} == set(FAMILIES)


def test_whole_path(case, data, tmp_path):
    name, family, folder, pairs = case
    target = torch.eye(len(LABELS))[[LABELS.index(label) for label in data[0]["esci_label"]]] * 0.9 + 0.025
    torch.manual_seed(1)
    backbone = load_backbone(str(folder), dropout=0.1)
    model = CrossEncoder(backbone, "weighted", dropout=0.1, pool_layers=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = [train_step(model, batch_of(pairs), target) for _ in range(5)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved
    positions = np.arange(len(pairs))
    probability = predict(model, pairs, positions, "fp32", batch_rows=5)
    assert probability.shape == (len(pairs), len(LABELS)) and np.allclose(probability.sum(1), 1, atol=1e-5)
    with quiet():
        save_model(model, tmp_path, load_tokenizer(str(folder)))
    again = load_model(tmp_path)
    assert layer_weights(again) == layer_weights(model) and list(layer_weights(again)) == [2, 3, 4, 5]
    np.testing.assert_array_equal(predict(again, pairs, positions, "fp32", batch_rows=5), probability)
    assert np.abs(predict(again, pairs, positions, "bf16") - probability).max() < 0.05


def test_batches_are_what_the_tokenizer_says(case, data):
    name, family, folder, pairs = case
    rows, products = data
    tokenizer = load_tokenizer(str(folder))
    assert (PairFrame.of(tokenizer).segments is not None) == family.segments
    title = products.set_index(["product_id", "product_locale"])[list(FIELDS)].agg(" ".join, axis=1)
    text = [title[key] for key in zip(rows["product_id"], rows["product_locale"])]
    expected = tokenizer(rows["query"].tolist(), text, truncation="longest_first", max_length=MAX_LENGTH, padding=True,
                         return_tensors="pt")
    batch = batch_of(pairs)
    assert set(batch) == set(expected)
    for key, value in batch.items():
        assert torch.equal(value, expected[key]), key


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def step_in_parts(folder, batch, parts: int, dropout: float) -> dict[str, torch.Tensor]:
    "The gradients of a step with everything on, the batch in so many parts."
    torch.manual_seed(5)
    engine, model = CpuEngine(torch.device("cpu")), CrossEncoder(load_backbone(str(folder), dropout), "weighted", dropout, 3)
    engine.prepare(model, "fp32", training=True)
    engine.parts = parts

    def loss() -> torch.Tensor:
        vectors = engine.vectors(model, batch)
        return model.classify(vectors.expand(2, *vectors.shape)).square().mean()

    with FGM(model).attack(lambda: loss().backward()):
        loss().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_parts_side_by_side_train_as_one_batch(case, two_threads):
    name, family, folder, pairs = case
    batch = batch_of(pairs)
    whole = step_in_parts(folder, batch, 1, 0.0)
    for parts in (2, 3):
        torch.testing.assert_close(step_in_parts(folder, batch, parts, 0.0), whole, atol=1e-5, rtol=1e-3)
    engine, recipe = CpuEngine(torch.device("cpu")), make_recipe("baseline")
    engine.prepare(CrossEncoder(load_backbone(str(folder))), "fp32", training=True, batch_tokens=recipe.batch_rows * recipe.max_length)
    parts = engine.parts
    assert parts == engine.copies() == (1 if name in ("rembert", "deberta-v2") else 2)
    first = step_in_parts(folder, batch, parts, 0.3)
    for _ in range(5):  # dropout follows the seed, not the thread that is first
        assert all(torch.equal(gradient, first[key]) for key, gradient in step_in_parts(folder, batch, parts, 0.3).items())
    assert not torch.equal(first["head.weight"], whole["head.weight"])


def test_parts_side_by_side_predict_the_same(case, two_threads, monkeypatch):
    name, family, folder, pairs = case
    monkeypatch.setattr("esci_nb.model.engines.PART_TOKENS", 100)
    model, positions = CrossEncoder(load_backbone(str(folder)), "weighted"), np.arange(len(pairs))
    two = predict(model, pairs, positions, "fp32")
    torch.set_num_threads(1)
    np.testing.assert_array_equal(predict(model, pairs, positions, "fp32"), two)
    monkeypatch.setattr("esci_nb.model.engines.PART_TOKENS", 10 ** 9)
    np.testing.assert_allclose(predict(model, pairs, positions, "fp32"), two, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_never_counts(case, pooling):
    name, family, folder, pairs = case
    torch.manual_seed(0)
    model = CrossEncoder(load_backbone(str(folder)), pooling).eval()
    order = np.argsort(pairs.lengths, kind="stable")
    positions = order[[0, 1, -1]]
    together, alone = predict(model, pairs, positions, "fp32"), predict(model, pairs, positions[:1], "fp32")
    assert pairs.lengths[positions[0]] < pairs.lengths[positions[-1]]
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_weighted_pooling_is_the_plain_loop(case):
    name, family, folder, pairs = case
    backbone = load_backbone(str(folder)).double().eval()
    model = CrossEncoder(backbone, "weighted", pool_layers=3).double().eval()
    torch.nn.init.normal_(model.layer_scores)
    batch = batch_of(pairs)
    seen, layers = [], find_layers(backbone)

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)
    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        logits = model(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == 5
    norm = getattr(backbone, family.top[0].split(".")[0]) if family.top else torch.nn.Identity()
    mask, weights = batch["attention_mask"], np.exp(model.layer_scores.detach().numpy())
    expected = torch.zeros(len(mask), 16, dtype=torch.float64)
    for weight, hidden in zip(weights / weights.sum(), seen[-3:]):
        hidden = norm(hidden).detach()
        for row in range(len(mask)):
            real = [hidden[row, token] for token in range(mask.shape[1]) if mask[row, token]]
            expected[row] += float(weight) * sum(real) / len(real)
    torch.testing.assert_close(logits, model.head(expected).detach(), atol=1e-6, rtol=1e-5)


def test_branches_without_dropout_are_one_pass(case):
    name, family, folder, pairs = case
    one, many = (CrossEncoder(load_backbone(str(folder), dropout=0.0), "weighted", dropout=0.0) for _ in range(2))
    many.load_state_dict(one.state_dict())
    batch, label = batch_of(pairs), torch.arange(len(pairs)) % len(LABELS)
    torch.nn.functional.cross_entropy(one.train()(**batch), label).backward()
    branches_loss(many.train(), batch, torch.nn.functional.one_hot(label, len(LABELS)).float()).backward()
    for (key, a), b in zip(one.named_parameters(), many.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=key)
    with torch.no_grad():
        assert torch.equal(one.eval()(**batch), many.eval()(**batch))


def test_half_precision_backbone_keeps_its_head(case):
    name, family, folder, pairs = case
    model = CrossEncoder(load_backbone(str(folder), dropout=0.0), "weighted", dropout=0.0)
    batch = batch_of(pairs)
    full = model(**batch).detach()
    model.backbone.to(torch.bfloat16)
    logits = model(**batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, full, atol=0.02, rtol=0.05)
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_parameter_in_its_group(case):
    name, family, folder, pairs = case
    model = CrossEncoder(load_backbone(str(folder)), "weighted")
    groups = parameter_groups(model, 2e-5, 1e-4, 0.01, WINNER_QUARTERS)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in model.parameters()}
    table = rate_table(model, groups).set_index("parameter")
    part = table["group"].str.removesuffix(", no decay")
    assert set(part.index[part == "embeddings"]) == {f"backbone.{parameter}" for parameter in family.embeddings}
    assert set(part.index[part == "head"]) == {"head.weight", "head.bias", "layer_scores"}
    layer = table.index.str.extract(r"^backbone\.(?:encoder\.)?layers?\.(\d+)\.", expand=False)
    expected = np.array(["quarter 1", "quarter 2", "quarter 3", "quarter 4", "quarter 4"])
    inside = layer.notna()
    assert (part[inside] == expected[layer[inside].astype(int)]).all() and set(layer[inside]) == set("01234")
    assert set(table.index[~inside & (part == "quarter 4")]) == {f"backbone.{parameter}" for parameter in family.top}
    norms_and_biases = table.index.str.contains(r"norm|bias$|layer_scores", case=False)
    assert (table["weight_decay"].eq(0) == norms_and_biases).all()
    rates = {"embeddings": 5e-6, "quarter 1": 5e-6, "quarter 2": 1e-5, "quarter 3": 1e-5, "quarter 4": 2e-5,
             "head": 1e-4}
    assert table["lr"].eq(part.map(rates)).all()


def test_dropout_reaches_every_module(case):
    name, family, folder, pairs = case
    backbone = load_backbone(str(folder), dropout=0.25)
    found = [module.p for module in backbone.modules() if isinstance(module, torch.nn.Dropout)]
    found += [module.attention_dropout for module in backbone.modules() if hasattr(module, "attention_dropout")]
    assert found and set(found) == {0.25}
    batch = batch_of(pairs)
    model = CrossEncoder(backbone, dropout=0.0).train()
    assert not torch.equal(model(**batch), model(**batch))


def test_gradient_checkpointing_changes_nothing(case):
    name, family, folder, pairs = case
    batch, gradients = batch_of(pairs), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = CrossEncoder(load_backbone(str(folder), dropout=0.0), "weighted", dropout=0.0)
        if checkpointing:
            model.backbone.gradient_checkpointing_enable()
        model.train()(**batch).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_position_limit(case):
    name, family, folder, pairs = case
    backbone = load_backbone(str(folder)).eval()
    limit = position_limit(backbone.config)

    def read(tokens: int) -> torch.Tensor:
        ids = torch.full((1, tokens), 4)
        with torch.no_grad():
            return backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    if family.reserved is None:
        assert limit == (None if name == "deberta-v2" else 32)
        assert read(100).shape == (1, 100, 16)
    else:
        assert limit == 32 - family.reserved and read(limit).shape == (1, limit, 16)
        with pytest.raises((IndexError, RuntimeError)):
            read(limit + 1)


def test_attention_that_is_promised_works(case):
    name, family, folder, pairs = case
    positions, results = np.arange(len(pairs)), []
    for kind in ("eager", "sdpa"):
        if kind in attention_kinds(name):
            backbone = AutoModel.from_pretrained(folder, attn_implementation=kind)
            assert backbone.config._attn_implementation == kind
            torch.manual_seed(0)
            results.append(predict(CrossEncoder(backbone), pairs, positions, "fp32"))
        else:
            with pytest.raises(ValueError):
                AutoModel.from_pretrained(folder, attn_implementation=kind)
    np.testing.assert_allclose(results[0], results[-1], atol=1e-5)


def test_facts_are_consistent():
    for name, facts in BACKBONES.items():
        config = facts.config()
        assert parameter_count(config) > 2e7 and config.model_type == facts.family, name
        assert "bf16" in facts.half_precision and facts.locales
        english = tuple(record.code for record in LOCALE_RECORDS if record.language == "English")
        assert facts.locales == (english if facts.languages == "English" else tuple(record.code for record in LOCALE_RECORDS))
        assert uses_segments(config) == (facts.family == "bert")


def test_one_layer_is_pooled_by_name_only():
    with pytest.raises(InputError):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "weighted")
    with pytest.raises(InputError):
        CrossEncoder(AutoModel.from_config(AutoConfig.for_model("bert", **SIZES | {"vocab_size": 10})), pool_layers=0)
    with pytest.raises(InputError):
        make_recipe(dropout_branches=0)
