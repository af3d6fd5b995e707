"""Every family of the backbone list goes the whole way as a tiny random model: encode, train, save, load, predict.

What a family names differently (layers, embeddings, norms, dropouts, tokens, segments, positions) is found here.
"""
import copy
import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from esci_nb.contract import LABELS, LOCALE_RECORDS, InputError
from esci_nb.data.load import load
from esci_nb.data.merge import merge_tasks
from esci_nb.hub import load_tokenizer, quiet
from esci_nb.identity import backbone_id
from esci_nb.model.backbones import BACKBONES, attention_kinds, load_backbone, parameter_count, position_limit, uses_segments
from esci_nb.model.cross_encoder import CrossEncoder, from_reranker, layer_weights, load_model, pool, save_model
from esci_nb.model.encode import EncodedPairs, PairFrame
from esci_nb.model.engines import CpuEngine, Engine, predictor
from esci_nb.model.layer_rates import find_layers, parameter_groups, rate_table
from esci_nb.model.lora import add_lora, merge_lora
from esci_nb.model.losses import soft_cross_entropy
from esci_nb.model.packed import PACKABLE
from esci_nb.model.rerankers import is_reranker, load_reranker
from esci_nb.recipe import OWN, POOLINGS, WINNER_QUARTERS, make_recipe, make_run
from esci_nb.strategy.adversarial import AWP, FGM
from esci_nb.strategy.base import Forward, Lists, TrainingRows
from esci_nb.strategy.multi_sample import MultiSampleDropout
from esci_nb.train import fit as fit_module
from esci_nb.train.batches import Ahead, TrainPairs
from esci_nb.train.fit import fit, predict

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
    "qwen3": Family({"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "num_key_value_heads": 1, "head_dim": 8}, BERT,
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
    assert parts == engine.copies() == (1 if name in ("rembert", "deberta-v2", "qwen3") else 2)
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


def as_reranker(case, folder, kind=AutoModelForSequenceClassification):
    "A tiny random reranker of a family in `folder`, and the tokenizer beside it."
    name, family, backbone, pairs = case
    tokenizer = load_tokenizer(str(backbone))
    torch.manual_seed(3)
    with quiet():
        config = AutoConfig.for_model(name, **family.config | SIZES | {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.3})
        model = kind.from_config(config).eval()
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_reranker_keeps_its_score(case, tmp_path):
    name, family, folder, pairs = case
    batch = batch_of(pairs)
    theirs = as_reranker(case, tmp_path)
    reranker = load_reranker(str(tmp_path))
    with torch.no_grad():
        expected = theirs(**batch).logits.squeeze(-1)
        torch.testing.assert_close(reranker.scores(**batch), expected, atol=1e-5, rtol=1e-4)
        model = from_reranker(reranker).eval()
        log_ratio = model(**batch).log_softmax(-1)
        torch.testing.assert_close(log_ratio[:, 0] - log_ratio[:, -1], expected, atol=1e-5, rtol=1e-4)
    target = torch.eye(len(LABELS))[torch.arange(len(pairs)) % len(LABELS)]
    assert np.isfinite([train_step(model, batch, target) for _ in range(3)]).all()
    with quiet():
        save_model(model.eval(), tmp_path / "saved", load_tokenizer(str(tmp_path)))
    positions = np.arange(len(pairs))
    np.testing.assert_array_equal(predict(load_model(tmp_path / "saved"), pairs, positions, "fp32"), predict(model, pairs, positions, "fp32"))


def test_low_rank_training(case):
    name, family, folder, pairs = case
    torch.manual_seed(0)
    model = CrossEncoder(load_backbone(str(folder)), dropout=0.0)
    batch, target = batch_of(pairs), torch.arange(len(pairs)) % len(LABELS)
    names, before = set(model.state_dict()), model(**batch).detach()
    add_lora(model.backbone, 2)
    torch.testing.assert_close(model(**batch), before)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 1e-2, 0.0))
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(**batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = model(**batch).detach()
    merge_lora(model.backbone)
    assert losses[-1] < losses[0] and set(model.state_dict()) == names
    torch.testing.assert_close(model(**batch), trained, atol=1e-5, rtol=1e-4)


def test_a_language_model_is_asked(data, tmp_path):
    family = FAMILIES["qwen3"]
    tokenizer = tiny_tokenizer(family, [*data[0]["query"], "yes no", "judge query document"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    with quiet():
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **family.config | SIZES | {
            "vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.3})).eval()
        theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert PairFrame.of(tokenizer).special > 20
    batch = tokenizer(data[0]["query"].tolist(), data[0]["query"].tolist()[::-1], padding=True, padding_side="right", return_tensors="pt")
    batch.pop("token_type_ids", None)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        logits = theirs(**batch).logits[torch.arange(len(data[0])), batch["attention_mask"].sum(1) - 1]
        torch.testing.assert_close(load_reranker(str(tmp_path)).scores(**batch), logits[:, yes] - logits[:, no], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["modernbert"], indirect=True)  # as the Ettin rerankers
def test_modules_of_sentence_transformers(case, tmp_path):
    name, family, folder, pairs = case
    modules, chain = pytest.importorskip("sentence_transformers.sentence_transformer.modules"), pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    end = dict(module_input_name="sentence_embedding")
    theirs = chain.CrossEncoder(modules=[
        modules.Transformer(str(folder)), modules.Pooling(16, pooling_mode="mean"), modules.Dense(16, 16, bias=False, activation_function=torch.nn.GELU(), **end),
        modules.LayerNorm(16), modules.Dense(16, 1, activation_function=torch.nn.Identity(), module_output_name="scores", **end)])
    theirs.save_pretrained(str(tmp_path / "chain"))
    assert is_reranker(str(tmp_path / "chain")) and not is_reranker(str(folder))
    texts = [("red lamp", "blue lamp"), ("lamp", "a red lamp for kids"), ("kids", "lamp")]
    expected = theirs.predict(texts, activation_fn=torch.nn.Identity())
    batch = load_tokenizer(str(tmp_path / "chain"))(*zip(*texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(load_reranker(str(tmp_path / "chain")).scores(**batch), expected, atol=1e-5)
    before = backbone_id(str(tmp_path / "chain"))
    (tmp_path / "chain" / "2_Dense" / "model.safetensors").write_bytes(b"other")
    assert backbone_id(str(tmp_path / "chain")) != before


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


class Exact(Engine):
    "The engine of a GPU on a CPU, in float64."

    def prepare(self, model, *args, **kwargs):
        return super().prepare(model, *args, **kwargs).double()


# each strategy at least once, and what changes the way through a model
TRAININGS = {"bert": dict(pooling="weighted", dropout_branches=3, adversary="awp", awp_below=1e3, ema=0.5, rdrop=1.0),
             "xlm-roberta": dict(adversary="fgm", lambda_rank=1.0, gain_mse=1.0, label_smoothing=0.1),
             "modernbert": dict(gradient_checkpointing=True, pooling="weighted", lr_quarters=WINNER_QUARTERS),
             "eurobert": dict(lora_rank=2, pooling="cls", rdrop=1.0), "deberta-v2": dict(pooling="cls")}


@pytest.mark.parametrize("case", TRAININGS, indirect=True)
def test_a_packed_training_is_the_padded_one(case, tmp_path, monkeypatch):
    "Through the trainer, in float64: losses, attacks, weights, predictions; batches made ahead beside batches that are not."
    name, family, folder, pairs = case
    rng, found = np.random.default_rng(0), {}
    rows = TrainingRows(np.arange(len(pairs)), rng.dirichlet(np.ones(len(LABELS)), len(pairs)).astype("float32"), rng.uniform(0.5, 2, len(pairs)).astype("float32"))
    run = make_run(backbone=str(folder), epochs=1, lr=1e-2, batch_rows=8, max_length=MAX_LENGTH, text_fields=FIELDS, precision="fp32", backbone_dropout=0.0,
                   **TRAININGS[name])
    for packed in (False, True):
        monkeypatch.setattr(fit_module, "pick_engine", lambda packed=packed: Exact(torch.device("cpu"), packed))
        monkeypatch.setattr(fit_module, "Ahead", lambda data, plan, *rest, packed=packed: Ahead(data, plan, 3 * packed))
        found[packed] = fit(run, pairs, rows, tmp_path / str(packed))
    padded, packed = found[False], found[True]
    assert packed.facts == padded.facts | ({"packed": 1} if name in PACKABLE else {}) and type(packed.model) is CrossEncoder
    losses = [[line["loss"] for line in one.history] for one in (padded, packed)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    for (what, one), other in zip(padded.model.state_dict().items(), packed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=what)
    one, other = (predict(some.model, pairs, rows.positions, "fp32") for some in (padded, packed))
    np.testing.assert_allclose(other, one, atol=1e-5)
    monkeypatch.setenv("ESCI_NB_PACKED", "1")
    np.testing.assert_allclose(predict(padded.model, pairs, rows.positions, "fp32"), one, atol=1e-5)


@pytest.mark.parametrize("case", ["bert", "modernbert"], indirect=True)
def test_a_training_with_compiled_layers_is_the_same(case, tmp_path, monkeypatch):
    "Compiled without a C++ compiler (the same graphs, run operator by operator), scored meanwhile, and what comes out is a plain model."
    name, family, folder, pairs = case
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = TrainingRows(np.arange(len(pairs)), np.eye(len(LABELS), dtype=np.float32)[np.arange(len(pairs)) % 4], np.ones(len(pairs), np.float32))
    found = {}
    for compiled in (False, True):
        monkeypatch.setattr(fit_module, "pick_engine", lambda compiled=compiled: Exact(torch.device("cpu"), True, compiled))
        run = make_run(backbone=str(folder), epochs=1, lr=1e-2, batch_rows=8, max_length=MAX_LENGTH, text_fields=FIELDS, precision="fp32",
                       backbone_dropout=0.0, **TRAININGS[name])
        found[compiled] = fit(run, pairs, rows, tmp_path / str(compiled), lists=[Lists("ndcg", 0.5, rows.positions, rows.positions // 4, rows.target[:, 0])])
    plain, compiled = found[False], found[True]
    assert compiled.facts == plain.facts | {"compiled": 1}
    for column in ("loss", "ndcg"):
        one, other = ([line[column] for line in some.history if line.get(column) is not None] for some in (plain, compiled))
        np.testing.assert_allclose(one, other, rtol=1e-6)
    for one, other in zip(plain.model.state_dict().values(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    trained = predict(compiled.model, pairs, rows.positions, "fp32")
    kept = copy.deepcopy(compiled.model)
    with torch.no_grad():
        for weight in compiled.model.backbone.parameters():
            weight.zero_()
    assert np.array_equal(predict(kept, pairs, rows.positions, "fp32"), trained)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["xlm-roberta"], indirect=True)
def test_a_packed_batch_is_dealt(case):
    "What two processes encode of a batch, each packed, is what one encodes."
    name, family, folder, pairs = case
    rows = TrainingRows(np.arange(len(pairs)), np.ones((len(pairs), len(LABELS)), np.float32), np.ones(len(pairs), np.float32))
    model, engine, positions = CrossEncoder(load_backbone(str(folder)), "weighted").eval(), Engine(torch.device("cpu"), packed=True), np.array([5, 1, 17, 8, 2])
    engine.prepare(model, "fp32", training=False)
    vectors, places = [], None
    for rank in (0, 1):
        batch = TrainPairs(pairs, rows, rank, 2, engine.lay_out).__getitems__(positions)
        places = batch["places"]
        with torch.no_grad():
            vectors.append(engine.vectors(model, {key: batch[key] for key in ("input_ids", "position_ids", "cu_seq_lens", "max_length")}))
    dealt = torch.stack([vectors[place % 2][place // 2] for place in places.tolist()])
    with torch.no_grad():
        whole = engine.vectors(model, engine.lay_out({key: values for key, values in pairs.__getitems__(positions).items() if key != "row"}))
    torch.testing.assert_close(dealt, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["bert"], indirect=True)
def test_a_reranker_is_trained_in_rows(case, tmp_path, monkeypatch):
    name, family, folder, pairs = case
    as_reranker(case, tmp_path / "reranker")
    rows = TrainingRows(np.arange(len(pairs)), np.eye(len(LABELS), dtype=np.float32)[np.arange(len(pairs)) % 4], np.ones(len(pairs), np.float32))
    run = make_run(backbone=str(tmp_path / "reranker"), pooling=OWN, epochs=1, batch_rows=8, max_length=MAX_LENGTH, text_fields=FIELDS, precision="fp32",
                   backbone_dropout=0.0)
    losses = []
    for wish in ("0", "1"):
        monkeypatch.setenv("ESCI_NB_PACKED", wish)
        fitted = fit(run, pairs, rows, tmp_path / wish)
        assert fitted.facts == ({"packed": 1} if wish == "1" else {}) and (fitted.padding == 0) == (wish == "1")
        losses.append([line["loss"] for line in fitted.history])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for name in ("ESCI_NB_COMPILE", "ESCI_NB_PACKED"):
        monkeypatch.setenv(name, "yes")
        with pytest.raises(InputError, match=f"{name} is 'yes'; give 0, 1 or nothing"):
            predictor(fitted.model)
        monkeypatch.delenv(name)


@pytest.mark.parametrize("case", ["bert"], indirect=True)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_memory_that_runs_out_halves_the_batch(case, packed, tmp_path, monkeypatch, capsys):
    "On a device where three pairs fit: the same losses and weights, in four pieces of two."
    name, family, folder, pairs = case
    monkeypatch.setattr(fit_module, "pick_engine", lambda: Exact(torch.device("cpu"), packed))
    rows = TrainingRows(np.arange(len(pairs)), np.eye(len(LABELS), dtype=np.float32)[np.arange(len(pairs)) % 4], np.ones(len(pairs), np.float32))
    run = make_run("awp", backbone=str(folder), epochs=1, batch_rows=8, max_length=MAX_LENGTH, text_fields=FIELDS, precision="fp32", backbone_dropout=0.0,
                   awp_below=1e3, ema=0.5)
    whole = fit(run, pairs, rows, tmp_path / "whole")
    forward = load_backbone(str(folder)).__class__.forward

    def narrow(self, *args, **inputs):
        size = len(inputs["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in inputs else len(inputs["input_ids"])
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(load_backbone(str(folder)).__class__, "forward", narrow)
    fitted = fit(run, pairs, rows, tmp_path / "narrow")
    assert fitted.facts == whole.facts | {"pieces": 4} and "Memory ran out in step 1" in capsys.readouterr().out
    np.testing.assert_allclose(*([line["loss"] for line in one.history] for one in (whole, fitted)), rtol=1e-6)
    for one, other in zip(whole.model.state_dict().values(), fitted.model.state_dict().values()):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["bert"], indirect=True)
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bits(case, kind, tmp_path, monkeypatch):
    "With bitsandbytes a run learns nearly the same, over fp32 masters of bf16 weights; without it is refused before anything is written."
    name, family, folder, pairs = case
    rows = TrainingRows(np.arange(len(pairs)), np.eye(len(LABELS), dtype=np.float32)[np.arange(len(pairs)) % 4], np.ones(len(pairs), np.float32))
    run = partial(make_run, backbone=str(folder), epochs=2, lr=1e-2, batch_rows=8, max_length=MAX_LENGTH, text_fields=FIELDS, precision="bf16")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=rf'optimizer={kind} needs bitsandbytes; install it by pip install "esci_nb\[large\]"'):
            fit(run(optimizer=kind), pairs, rows, tmp_path / "eight")
        assert not (tmp_path / "eight").exists()
        return
    plain, eight = fit(run(), pairs, rows, tmp_path / "plain"), fit(run(optimizer=kind), pairs, rows, tmp_path / "eight")
    np.testing.assert_allclose(*([line["loss"] for line in one.history] for one in (plain, eight)), rtol=0.05)
    assert not torch.equal(plain.model.head.weight, eight.model.head.weight) and eight.model.head.weight.dtype == torch.float32
