"""Reward heads: every pooler against its formula in fp64, and dropout."""

import pytest
import torch

from dph.model.config import POOLERS
from dph.model.heads import RewardHead

C, F = 12, 20


def head_of(pooler, names=("a", "b"), dropout=0.0):
    head = RewardHead(list(names), pooler, C, F, dropout)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.4)
    return head


def definition(head, pooler, hidden):
    """The paper's heads without dropout, in fp64: {name: [R]}."""
    w = {name: tensor.detach().double() for name, tensor in head.state_dict().items()}
    h = hidden.double()
    first = 1 if pooler.endswith("t5") else 0
    if pooler.startswith("swiglu"):
        x, g = (h @ w[f"pooler.{first}.weight"].T + w[f"pooler.{first}.bias"]).split(F, -1)
        h = x * g / (1 + (-g).exp())
        first += 2
    if pooler != "identity":
        h = (h @ w[f"pooler.{first}.weight"].T + w[f"pooler.{first}.bias"]).tanh()
    return {name: h @ w[f"reward.{name}.weight"][0] for name in head.reward}


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_every_pooler_is_its_formula(pooler, rows):
    head, hidden = head_of(pooler), torch.randn(rows, C, requires_grad=True)
    rewards = head(hidden)
    for name, expected in definition(head, pooler, hidden).items():
        assert rewards[name].dtype == torch.float32
        torch.testing.assert_close(rewards[name].double(), expected, rtol=0, atol=1e-5)
    assert list(rewards) == ["a", "b"]


@pytest.mark.parametrize("pooler", POOLERS)
def test_gradients_are_those_of_the_formula(pooler):
    head, hidden = head_of(pooler).double(), torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    parameters = [hidden, *head.parameters()]

    def rewards(*_):
        return torch.stack(list(head(hidden).values()))

    assert torch.autograd.gradcheck(rewards, parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rewards_are_fp32_whatever_the_weights_are(dtype):
    head, hidden = head_of("swiglu_bert").to(dtype), torch.randn(4, C).to(dtype)
    reward = head(hidden)["a"]
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward.double(), definition(head, "swiglu_bert", hidden)["a"], rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("pooler", "places"),
    [
        ("identity", set()),
        ("bert", {"0"}),
        ("t5", {"1"}),
        ("swiglu_bert", {"0", "2"}),
        ("swiglu_t5", {"1", "3"}),
    ],
)
def test_weights_keep_their_places_in_the_released_pipeline(pooler, places):
    names = head_of(pooler).state_dict()
    assert {name.split(".")[1] for name in names if name.startswith("pooler.")} == places
    assert {name for name in names if name.startswith("reward.")} == {"reward.a.weight", "reward.b.weight"}


# Dropout


@pytest.mark.parametrize("pooler", POOLERS)
def test_dropout_in_training_only(pooler):
    head, hidden = head_of(pooler, dropout=0.5), torch.randn(6, C)
    head.train()
    first, again, other = (head(hidden, seed=s)["a"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    head.eval()
    assert torch.equal(head(hidden, seed=1)["a"], head(hidden)["a"])
    torch.testing.assert_close(head(hidden)["a"].double(), definition(head, pooler, hidden)["a"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("pooler", POOLERS)
def test_dropout_is_switched_off_by_an_argument(pooler, hooks):
    head, hidden, called = head_of(pooler, dropout=0.5), torch.randn(6, C), []
    expected = head.eval()(hidden)["a"]
    head.train()
    drops = [module for module in head.modules() if isinstance(module, torch.nn.Dropout)]
    if hooks:
        for module in drops:
            module.register_forward_hook(lambda module, *_: called.append(module.training))
    state = torch.get_rng_state()
    for seed in (None, 1):
        torch.testing.assert_close(head(hidden, seed, dropout=False)["a"], expected)
    assert called == [False] * (2 * len(drops) * hooks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in head.modules())
    assert not torch.allclose(head(hidden, 1)["a"], expected)


def test_a_seed_is_drawn_from_torch_where_none_is_given():
    head, hidden = head_of("bert", dropout=0.5).train(), torch.randn(6, C)
    torch.manual_seed(3)
    first, second = head(hidden)["a"], head(hidden)["a"]
    torch.manual_seed(3)
    assert torch.equal(head(hidden)["a"], first)
    assert not torch.equal(first, second)
    without, state = head_of("bert").train(), torch.get_rng_state()
    without(hidden)  # no dropout
    head(hidden, seed=4)
    head.eval()(hidden)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_keeps_its_mask_in_any_batch():
    head, hidden = head_of("swiglu_t5", dropout=0.3).train(), torch.randn(8, C)
    ids = torch.arange(8) + 100
    whole = head(hidden, seed=1, row_ids=ids)["b"]
    order = torch.tensor([5, 2, 7])
    torch.testing.assert_close(head(hidden[order], seed=1, row_ids=ids[order])["b"], whole[order])


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_pooled_state_keeps_its_mean(probability):
    """identity with ones: a reward is the number of kept columns over 1 - p; both heads see one mask."""
    head = head_of("identity", dropout=probability).train()
    with torch.no_grad():
        for vector in head.reward.values():
            vector.weight.fill_(1.0)
    rewards = head(torch.ones(4000, C), seed=1)
    assert torch.equal(rewards["a"], rewards["b"])
    kept = rewards["a"] * (1 - probability)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert rewards["a"].mean().item() == pytest.approx(C, rel=0.02)


def test_only_the_t5_kinds_drop_the_hidden_state():
    """With the pooled state's dropout off, what is left is the input's."""
    hidden = torch.randn(50, C)
    for pooler in ("bert", "t5"):
        head = head_of(pooler, dropout=0.5).train()
        head.dropout.p = 1e-9  # keeps every column
        expected = definition(head, pooler, hidden)["a"]
        same = torch.allclose(head(hidden, seed=1)["a"].double(), expected, atol=1e-4)
        assert same == (pooler == "bert")


# Replaced and observed modules


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.Tensor):
    """A weight of another class, as of quantised layers."""


@pytest.mark.parametrize("pooler", POOLERS)
def test_modules_compute_what_the_kernel_does(pooler):
    """A hook makes the head call its modules: the same rewards, gradients and dropout masks."""
    head, hidden = head_of(pooler, dropout=0.4).train(), torch.randn(6, C, requires_grad=True)
    assert not head._is_modified()
    ids = torch.arange(6) + 10
    results = []
    for _ in range(2):
        rewards = head(hidden, seed=7, row_ids=ids)
        total = sum((i + 1) * reward.square().sum() for i, reward in enumerate(rewards.values()))
        results.append([*rewards.values(), *torch.autograd.grad(total, [hidden, *head.parameters()])])
        head.reward["a"].register_forward_hook(lambda *_: None)
    for fused, called in zip(*results, strict=True):
        torch.testing.assert_close(called, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooler", [name for name in POOLERS if name != "identity"])
def test_every_layer_is_called_once_it_is_not_the_original(pooler):
    head, hidden = head_of(pooler), torch.randn(3, C)
    for i, layer in enumerate(head.pooler):
        called = []
        handle = layer.register_forward_hook(lambda *_, i=i, called=called: called.append(i))
        head(hidden)
        handle.remove()
        assert called == [i]
    last = len(head.pooler) - 2
    before = head(hidden)["a"]
    old, head.pooler[last] = head.pooler[last], Doubled(C if "swiglu" not in pooler else F, C)
    head.pooler[last].load_state_dict(old.state_dict())
    assert not torch.allclose(head(hidden)["a"], before)
    head.pooler[last] = torch.nn.Sequential(old)
    torch.testing.assert_close(head(hidden)["a"], before)
    head.reward["a"] = torch.nn.Sequential(head.reward["a"], torch.nn.Flatten())
    torch.testing.assert_close(head(hidden)["a"], before)


def test_weights_of_another_class_are_left_to_their_module():
    head, hidden = head_of("bert"), torch.randn(3, C)
    before, layer, called = head(hidden)["a"], head.pooler[0], []
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Wrapped), requires_grad=False)
    head.dropout.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(head(hidden)["a"].as_subclass(torch.Tensor), before)
    assert called


def test_dropout_is_that_of_its_modules():
    """Libraries switch dropout off in ``torch.nn.Dropout``."""
    head, hidden = head_of("swiglu_t5", dropout=0.5).train(), torch.randn(6, C)
    for module in head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(head(hidden)["a"], head.eval()(hidden)["a"])
