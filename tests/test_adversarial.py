"""FGM and AWP: accumulation, scaled gradients, exceptions, tied and frozen weights, dtypes."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from esci_nb.strategy.adversarial import AWP, FGM, Adversary, rows_with_gradient, word_embeddings
from esci_nb.contract import InputError

ATTACKS = {"fgm": lambda model: FGM(model, epsilon=0.2), "awp": lambda model: AWP(model, lr=0.05, below=100.0)}
CONFIG = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Pairs(nn.Module):
    "A tiny classifier with a backbone, as the library's models are built."

    def __init__(self):
        super().__init__()
        self.backbone = BertModel(CONFIG, add_pooling_layer=False)
        self.head = nn.Linear(16, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(input_ids=words).last_hidden_state.mean(1))


@pytest.fixture
def model() -> Pairs:
    torch.manual_seed(0)
    return Pairs()


def batch(seed: int, vocabulary: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(5, vocabulary, (4, 6), generator=generator), torch.randint(0, 4, (4,), generator=generator))


def loss_of(model: nn.Module, seed: int, vocabulary: int = 60) -> torch.Tensor:
    words, label = batch(seed, vocabulary)
    return F.cross_entropy(model(words).float(), label)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    "Equal to the last bit."
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def step(model: nn.Module, adversary: Adversary, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    "One attacked micro-batch; returns the weights as they were inside."
    with adversary.attack((loss_of(model, seed) * scale).backward):
        inside = weights_of(model)
        (loss_of(model, seed) * scale).backward()
    return inside


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_accumulation_attacks_each_micro_batch_alone(model, attack):
    before, adversary = weights_of(model), attack(model)
    alone = []
    for seed in range(3):
        model.zero_grad()
        inside = step(model, attack(model), seed)
        alone.append((inside, gradients_of(model)))
    model.zero_grad()
    for seed in range(3):
        inside = step(model, adversary, seed)
        assert same(inside, alone[seed][0]) and not same(inside, before)
        assert same(weights_of(model), before)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, sum(gradients[name] for _, gradients in alone))
    assert adversary.attacks == 3


def test_a_micro_batch_that_is_not_attacked_counts_as_well(model):
    adversary = AWP(model, below=100.0)
    step(model, adversary, 0)
    attacked = gradients_of(model)
    model.zero_grad()
    loss_of(model, 1).backward()
    plain = gradients_of(model)
    model.zero_grad()
    loss_of(model, 1).backward()
    step(model, adversary, 0)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, attacked[name] + plain[name])


def test_clean_gradient_is_added_by_fgm_and_replaced_by_awp(model):
    loss_of(model, 0).backward()
    clean = gradients_of(model)
    for attack, share in ((FGM, 2), (AWP, 1)):
        adversary = attack(model)
        adversary._perturb = lambda: False  # no push: the second gradient is the clean one again
        model.zero_grad()
        step(model, adversary, 0)
        for name, gradient in gradients_of(model).items():
            torch.testing.assert_close(gradient, share * clean[name])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_scaled_gradients_push_the_same_way(model, attack):
    plain, scaled = step(model, attack(model), 0), step(model, attack(model), 0, scale=65536.0)
    assert same(plain, scaled)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_fp16_with_a_scaler(model, attack):
    "A scale that overflows: no push, no step, lower scale. Then a step that trains."
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, adversary, before = torch.amp.GradScaler("cpu", init_scale=2.0**120), attack(model), weights_of(model)

    def scaled_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return scaler.scale(loss_of(model, 0))

    for expected in (0, 1):
        optimizer.zero_grad()
        with adversary.attack(scaled_loss().backward):
            assert same(weights_of(model), before) == (expected == 0)
            scaled_loss().backward()
        assert same(weights_of(model), before) and adversary.attacks == expected
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        assert same(weights_of(model), before) == (expected == 0)
        scaler.update(2.0**8)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_useless_gradients_push_nothing(model, attack, bad):
    before, adversary = weights_of(model), attack(model)
    assert same(step(model, adversary, 0, scale=bad), before) and same(weights_of(model), before)
    assert adversary.attacks == 0


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_one_bad_number_is_enough(model, attack):
    before, adversary = weights_of(model), attack(model)

    def spoiled():
        loss_of(model, 0).backward()
        word_embeddings(model).grad[7, 3] = math.nan

    with adversary.attack(spoiled):
        assert same(weights_of(model), before)
    assert adversary.attacks == 0


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_exceptions_restore(model, attack):
    before, adversary = weights_of(model), attack(model)
    with pytest.raises(KeyboardInterrupt), adversary.attack(loss_of(model, 0).backward):
        assert not same(weights_of(model), before)
        raise KeyboardInterrupt
    assert same(weights_of(model), before)

    model.zero_grad()
    loss_of(model, 1).backward()
    earlier = gradients_of(model)

    def broken():
        loss_of(model, 0).backward()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), adversary.attack(broken):
        raise AssertionError("not reached")
    assert same(weights_of(model), before)
    assert torch.equal(word_embeddings(model).grad, earlier["backbone.embeddings.word_embeddings.weight"])
    inside = step(model, adversary, 0)
    assert not same(inside, before) and same(weights_of(model), before)


def test_who_moves(model):
    words = batch(0)[0].unique()
    before = weights_of(model)
    table = "backbone.embeddings.word_embeddings.weight"
    moved = {name: (weight != before[name]).any(-1) for name, weight in step(model, FGM(model, 0.2), 0).items()}
    assert [name for name, rows in moved.items() if rows.any()] == [table]
    assert torch.equal(moved[table].nonzero().squeeze(1), words)
    inside = step(model, AWP(model), 0)
    moved = {name for name, weight in inside.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in before.items() if weight.ndim > 1}
    assert torch.equal((inside[table] != before[table]).any(-1).nonzero().squeeze(1), words)


def test_awp_stays_within_the_clamp(model):
    before = weights_of(model)
    for name, weight in step(model, AWP(model, lr=10.0, epsilon=0.01), 0).items():
        assert ((weight - before[name]).abs() <= 0.01 * before[name].abs() * (1 + 1e-4) + 1e-9).all(), name
    assert torch.equal(before["backbone.embeddings.word_embeddings.weight"][0], torch.zeros(16)), "the padding row"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_tied_embeddings(attack):
    "The output layer of a masked language model is the word embedding matrix: moved once, restored once."
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG)
    assert model.get_output_embeddings().weight is word_embeddings(model)
    words, before = batch(0)[0], weights_of(model)
    for _ in range(2):
        with attack(model).attack(lambda: model(input_ids=words, labels=words).loss.backward()):
            assert not torch.equal(word_embeddings(model), before["bert.embeddings.word_embeddings.weight"])
            model(input_ids=words, labels=words).loss.backward()
        assert same(weights_of(model), before)


def test_shared_matrix_and_shared_storage(model):
    first, second = model.backbone.encoder.layer
    second.output.dense.weight = first.output.dense.weight
    second.intermediate.dense.weight = nn.Parameter(first.intermediate.dense.weight.data)  # same memory, another name
    before = weights_of(model)
    inside = step(model, AWP(model, lr=0.05), 0)
    assert not same(inside, before) and same(weights_of(model), before)


def test_frozen_parameters(model):
    model.backbone.encoder.layer[0].requires_grad_(False)
    before = weights_of(model)
    inside = step(model, AWP(model), 0)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen and all(torch.equal(inside[name], before[name]) for name in frozen) and not same(inside, before)
    model.backbone.embeddings.requires_grad_(False)
    inside = step(model, AWP(model), 0)
    assert not same(inside, before) and same(weights_of(model), before)
    assert torch.equal(inside["backbone.embeddings.word_embeddings.weight"], word_embeddings(model))
    with pytest.raises(InputError, match="frozen"):
        FGM(model)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        AWP(model)


def test_only_the_embeddings_train(model):
    model.requires_grad_(False)
    word_embeddings(model).requires_grad_(True)
    before = weights_of(model)
    for adversary in (FGM(model, 0.2), AWP(model)):
        assert not same(step(model, adversary, 0), before) and same(weights_of(model), before)


def test_a_matrix_whose_gradient_is_zero_stays(model):
    model.spare = nn.Linear(3, 3)
    before, adversary = weights_of(model), AWP(model)
    with adversary.attack(lambda: (loss_of(model, 0) + 0 * model.spare.weight.sum()).backward()):
        inside = weights_of(model)
    assert torch.equal(inside["spare.weight"], before["spare.weight"]) and not same(inside, before)
    assert adversary.attacks == 1


def test_rows_with_gradient():
    gradient = torch.zeros(6, 3)
    gradient[1, 0], gradient[2, 2], gradient[4, 1], gradient[5, 1] = 1e-30, -1e-30, math.nan, math.inf
    assert rows_with_gradient(gradient).tolist() == [1, 2, 4, 5]


def test_parameters_that_the_loss_does_not_use(model):
    model.spare = nn.Linear(3, 3)
    before = weights_of(model)
    for adversary in (FGM(model, 0.2), AWP(model)):
        model.zero_grad()
        inside = step(model, adversary, 0)
        assert torch.equal(inside["spare.weight"], before["spare.weight"]) and same(weights_of(model), before)
        assert model.spare.weight.grad is None


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None], ids=str)
def test_dtypes(model, attack, dtype):
    "float64, pure bf16, and a backbone in bf16 under a head in float32."
    if dtype is not None:
        model.to(dtype)
    else:
        model.backbone.to(torch.bfloat16)
        model.backbone.register_forward_hook(lambda module, inputs, output: setattr(
            output, "last_hidden_state", output.last_hidden_state.float()))
    before, adversary = weights_of(model), attack(model)
    for seed in range(2):
        assert not same(step(model, adversary, seed), before) and same(weights_of(model), before)


def test_buffers_are_made_once(model):
    adversary = AWP(model)
    step(model, adversary, 0)
    places = {id(weight): buffer.data_ptr() for weight, buffer in adversary._buffers.items()}
    step(model, adversary, 1)
    assert places == {id(weight): buffer.data_ptr() for weight, buffer in adversary._buffers.items()}
    assert word_embeddings(model) not in adversary._buffers


def test_an_open_autocast_region_sees_the_push(model):
    features = torch.ones(1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        clean = model.head(features)
        with AWP(model, lr=1.0, epsilon=0.5).attack(loss_of(model, 0).backward):
            attacked = model.head(features)
        assert not torch.equal(clean, attacked) and torch.equal(clean, model.head(features))


def test_attack_raises_the_loss(model):
    for attack in ATTACKS.values():
        clean = loss_of(model, 0)
        with attack(model).attack(clean.backward):
            assert loss_of(model, 0) > clean


def test_wants():
    model = Pairs()
    assert all(map(FGM(model).wants, (0.1, 5.0)))
    adversary = AWP(model, below=0.6)
    assert adversary.wants(0.59) and not any(map(adversary.wants, (0.6, 2.0, math.nan, math.inf, -math.inf)))


@pytest.mark.parametrize("attack, values", [(FGM, {"epsilon": 0}), (FGM, {"epsilon": math.nan}), (AWP, {"lr": 0}),
                                            (AWP, {"epsilon": -1}), (AWP, {"below": math.inf})])
def test_bad_values_are_refused(model, attack, values):
    with pytest.raises(InputError, match=f"{next(iter(values))} of {attack.__name__} is"):
        attack(model, **values)


def test_nothing_stays_in_the_model(model):
    "Same state afterwards, and no more buffers than before."
    state, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    for attack in ATTACKS.values():
        step(model, attack(model), 0)
    assert same(state, model.state_dict()) and [*dict(model.named_buffers())] == [*dict(twin.named_buffers())]
