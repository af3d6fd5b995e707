"""Packed equals padded, in float64: every family that packs, every pooling, logits and gradients; and batches at the edges."""
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from esci_nb.contract import InputError
from esci_nb.model.backbones import _DROPOUTS, without_pooler
from esci_nb.model.cross_encoder import CrossEncoder
from esci_nb.model.lora import add_lora
from esci_nb.model.packed import (PACKABLE, PackedCrossEncoder, can_pack, fill_batches, first_position, pack, pack_padded, packed_pool, read_packed,
                                  read_padded, segment_count)
from esci_nb.model.rerankers import Neck, NeckShape
from esci_nb.recipe import OWN

SHAPE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=97, max_position_embeddings=64)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
FAMILIES = {"bert": dict(type_vocab_size=2, pad_token_id=0), "xlm-roberta": dict(type_vocab_size=1, pad_token_id=1),
            "modernbert": SPECIAL | dict(local_attention=8, global_attn_every_n_layers=3),
            "eurobert": SPECIAL | dict(num_key_value_heads=2, mask_token_id=3)}
TOLERANCE = {"bert": 1e-12, "xlm-roberta": 1e-12, "modernbert": 1e-6, "eurobert": 1e-6}  # the last two round to float32 in norms and rotations
LENGTHS = np.array([23, 1, 40, 7, 12])


def build(family, pooling, kind=CrossEncoder, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family], attn_implementation="sdpa")
    for key in _DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    model = kind(without_pooler(AutoModel.from_config(config)), pooling, dropout=0.0, pool_layers=3, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():  # also biases, norms and pooling scores, which start as constants
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def both(backbone, lengths=LENGTHS, shape=(130, 8, 40)):
    "The same random pairs padded and packed, with segments where the model has them."
    rng, pad = np.random.default_rng(1), backbone.config.pad_token_id
    texts = [rng.integers(3, 97, length) for length in lengths]
    two = getattr(backbone.config, "type_vocab_size", 0) > 1
    types = [(np.arange(length) >= length // 2) & two for length in lengths]
    longest = max(lengths)
    padded = {"input_ids": np.stack([np.pad(text, (0, longest - len(text)), constant_values=pad) for text in texts]),
              "token_type_ids": np.stack([np.pad(some, (0, longest - len(some))) for some in types]).astype(int),
              "attention_mask": (np.arange(longest) < np.asarray(lengths)[:, None]).astype(int)}
    packed = pack(np.concatenate(texts), np.asarray(lengths), first_position(backbone), pad, np.concatenate(types), shape)
    return [{name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()} for batch in (padded, packed)]


def loss_of(logits, pairs):
    "A weighted soft cross-entropy; what is no pair has weight 0."
    torch.manual_seed(3)
    target, weight = torch.rand(pairs, 4, dtype=torch.float64).softmax(-1), torch.rand(pairs, dtype=torch.float64) + 0.5
    rest = len(logits) - pairs
    target, weight = torch.cat([target, target.new_zeros(rest, 4)]), torch.cat([weight, weight.new_zeros(rest)])
    return (-(target * logits.log_softmax(-1)).sum(-1) * weight).sum() / weight.sum()


@pytest.mark.parametrize("pooling", ["mean", "cls", "weighted"])
@pytest.mark.parametrize("family", PACKABLE)
def test_packed_is_padded(family, pooling):
    plain, packed = build(family, pooling), build(family, pooling, PackedCrossEncoder, max_length=40)
    wide, row = both(plain.backbone)
    expected, found = plain(**wide), packed(**row)
    assert len(found) == segment_count((130, 8, 40)) and expected.std() > 0.01
    assert torch.allclose(found[:len(LENGTHS)], expected, rtol=0, atol=TOLERANCE[family])
    for logits in (expected, found):
        loss_of(logits, len(LENGTHS)).backward()
    for (name, one), two in zip(plain.named_parameters(), packed.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            assert torch.allclose(two.grad, one.grad, rtol=0, atol=TOLERANCE[family]), name


@pytest.mark.parametrize("family", PACKABLE)
def test_neighbours_do_not_matter(family):
    model = build(family, "mean", PackedCrossEncoder, max_length=40)
    together = model(**both(model.backbone, shape=None)[1])
    ids = both(model.backbone, shape=None)[1]
    start = 0
    for number, length in enumerate(LENGTHS):
        alone = pack(ids["input_ids"][0, start:start + length].numpy(), np.array([length]), first_position(model.backbone),
                     model.backbone.config.pad_token_id, ids["token_type_ids"][0, start:start + length].numpy())
        alone = model(**{name: torch.from_numpy(values) for name, values in alone.items()})
        assert torch.allclose(alone[0], together[number], rtol=0, atol=TOLERANCE[family])
        start += length


def test_the_same_without_filling():
    model = build("xlm-roberta", "weighted", PackedCrossEncoder, max_length=40)
    filled, exact = model(**both(model.backbone)[1]), model(**both(model.backbone, shape=None)[1])
    assert len(exact) == len(LENGTHS) and torch.allclose(filled[:len(LENGTHS)], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5], [40], []], ids=["one pair", "a pair as long as may be", "no pair"])
def test_edges(lengths):
    model = build("bert", "mean", PackedCrossEncoder, max_length=40)
    lengths = np.array(lengths, int)
    row = pack(np.full(lengths.sum(), 7), lengths, 0, 0, shape=(80, 3, 40))
    assert row["input_ids"].shape == (1, 80) and row["cu_seq_lens"].shape == (6,) and row["cu_seq_lens"][-1] == 80
    assert np.diff(row["cu_seq_lens"]).max() <= 40
    logits = model(**{name: torch.from_numpy(values) for name, values in row.items()})
    assert logits.shape == (5, 4) and logits.isfinite().all()


def test_positions_of_each_family():
    assert {family: first_position(build(family, "mean").backbone) for family in PACKABLE} == {
        "bert": 0, "xlm-roberta": 2, "modernbert": 0, "eurobert": 0}
    row = pack(np.arange(5), np.array([3, 2]), 2, 1, shape=(9, 3, 4))
    assert row["position_ids"].tolist() == [[2, 3, 4, 2, 3, 2, 3, 4, 5]]


def test_counting_on_through_the_row_would_be_wrong():
    "What the test above would miss if the positions did not matter: XLM-R left to count by itself gives other logits."
    model = build("xlm-roberta", "mean", PackedCrossEncoder, max_length=40)
    row = both(model.backbone, np.array([9, 8, 7]), None)[1]
    wrong = row | {"position_ids": torch.arange(24, dtype=torch.int32)[None] + 2}
    right, wrong = model(**row), model(**wrong)
    assert torch.allclose(right[0], wrong[0]) and (right[1:] - wrong[1:]).abs().min() > 1e-6


def test_refusals():
    config = AutoConfig.for_model("deberta-v2", **SHAPE)
    assert not can_pack(config)
    with pytest.raises(InputError, match="deberta-v2"):
        PackedCrossEncoder(AutoModel.from_config(config))
    for shape in ((4, 3, 9), (9, 1, 9), (9, 3, 2)):
        with pytest.raises(InputError, match="do not fit"):
            pack(np.arange(5), np.array([3, 2]), 0, 0, shape=shape)
    with pytest.raises(InputError, match="raise it"):
        fill_batches(np.array([3, 9]), 8, 4)
    with pytest.raises(InputError, match="cls and mean"):
        packed_pool(torch.zeros(2, 3), torch.tensor([0, 2]), "max")


def test_batches_hold_every_row_once():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    order = np.random.default_rng(1).permutation(500)
    plan = fill_batches(lengths, 400, 20, order)
    assert np.array_equal(np.concatenate(plan), order)
    assert max(lengths[rows].sum() for rows in plan) <= 400 and max(map(len, plan)) <= 20
    assert all(lengths[rows].sum() + lengths[after[0]] > 400 or len(rows) == 20 for rows, after in zip(plan, plan[1:]))


def test_segments_of_a_model_without_them_are_ignored():
    model = build("xlm-roberta", "mean", PackedCrossEncoder, max_length=40)
    row = both(model.backbone, shape=None)[1]
    assert torch.equal(model(**row), model(**row | {"token_type_ids": torch.ones_like(row["input_ids"])}))


@pytest.mark.parametrize("pooled", ["cls", "mean", "last", "late"])
def test_the_neck_of_a_reranker_reads_rows(pooled):
    torch.manual_seed(1)
    neck = Neck(NeckShape(32, pooled, "tanh", norm=1e-5))
    model = build("modernbert", OWN, neck=neck)
    wide = {name: values for name, values in both(model.backbone)[0].items() if name != "token_type_ids"}
    expected = model(**wide)
    found = read_packed(model)(**pack_padded(wide, 0))
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE["modernbert"]) and expected.std() > 0.01
    assert type(read_padded(model)) is CrossEncoder and torch.equal(model(**wide), expected), "and back"


def test_low_rank_changes_are_trained_in_rows():
    gradients = []
    for packed in (False, True):
        model = build("eurobert", "weighted")
        torch.manual_seed(2)
        add_lora(model.backbone, 2).double()
        with torch.no_grad():
            for weight in model.backbone.parameters():
                weight.add_(0.1 * torch.randn_like(weight) if weight.requires_grad else 0)
        wide = both(model.backbone)[0]
        loss_of(read_packed(model)(**pack_padded(wide, 0)) if packed else model(**wide), len(LENGTHS)).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert any(name.endswith(".a") for name in gradients[0]) and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=0, atol=TOLERANCE["eurobert"]), name
