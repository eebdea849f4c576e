"""Heads on the states of other layers than the last, standardised or not: every way to a reward gives the same."""

import copy

import pytest
import torch
from helpers.tiny import END, FORMS, tiny_config, tiny_model, tokens

import dph
from dph.chat import Encoded
from dph.errors import UserError
from dph.model.auto_classes import RewardModel
from dph.model.heads import Standardise

IDS = torch.cat([tokens(3, 9), torch.full((3, 1), END)], 1)


def finished(ids):
    ids, mask = ids.tolist(), [False] * len(ids)
    return Encoded(ids, ids, mask, mask, len(ids) - 1)


@pytest.mark.parametrize("form", [{}, FORMS["qwen3"]], ids=["dph", "qwen3"])
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_rewards_are_those_of_the_layer_s_states(layer, form):
    model = tiny_model(reward_layer=layer, num_hidden_layers=3, reward_standardised=True, **form)
    states = model(IDS, output_hidden_states=True).hidden_states[layer][:, -1]
    model.heads["shared"].standardise.fit(torch.randn(20, 16) * 3 + 1)
    plain = tiny_model(num_hidden_layers=3, **form).heads["shared"]  # the same head without the two
    plain.load_state_dict(model.heads["shared"].state_dict(), strict=False)
    figures = model.heads["shared"].standardise
    expected = plain((states - figures.mean) / figures.deviation)["default"]
    torch.testing.assert_close(model.rewards(IDS)["default"], expected)
    batch = dph.pack([[finished(ids)] for ids in IDS])
    torch.testing.assert_close(model.forward_packed(batch).rewards["default"], expected)
    torch.testing.assert_close(model.rewards_of(model.reward_states(batch))["default"], expected)
    classifier = RewardModel(copy.deepcopy(model.config)).eval()
    classifier.load_state_dict(model.state_dict())
    output = classifier(IDS, output_hidden_states=True)
    torch.testing.assert_close(output.logits[:, 0], expected)
    assert len(output.hidden_states) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_column_that_varies_by_rounding_alone_keeps_its_scale(dtype):
    """As the state of the last token below the first block, which is the same for all answers."""
    torch.manual_seed(0)
    states = torch.randn(40, 6)
    states[:, 0], states[:, 1] = 0.37, 0.37 + 1e-7 * torch.randn(40)
    states[:, 2], states[:, 3] = 1e-6 * states[:, 2], 100 + states[:, 3]
    states = states.to(dtype)
    figures = Standardise(6)
    figures.fit(states)
    exact = states.double()
    constant = [0, 1]
    assert figures.deviation[constant].tolist() == [1.0, 1.0]
    torch.testing.assert_close(figures.deviation[2:].double(), exact[:, 2:].std(0), rtol=1e-6, atol=0.0)
    assert (figures((states + 1e-6 * torch.randn(40, 6)).float())[:, constant].abs() < 1e-2).all()


@pytest.mark.parametrize("layers", [[1, 2], [2, 0, -1]])
@pytest.mark.parametrize("pooler", ["identity", "swiglu_bert"])
def test_a_mix_judges_the_weighted_sum_of_its_layers(layers, pooler, tmp_path):
    model = tiny_model(reward_layer=layers, num_hidden_layers=3, reward_standardised=True, reward_pooler=pooler)
    head = model.heads["shared"]
    head.standardise.fit(torch.randn(20, 16 * len(layers)) * 3 + 1)
    states = model(IDS, output_hidden_states=True).hidden_states
    joined = torch.cat([states[layer][:, -1] for layer in layers], 1)
    mixed = (((joined - head.standardise.mean) / head.standardise.deviation).view(3, -1, 16) * head.mix.weight).sum(1)
    plain = tiny_model(num_hidden_layers=3, reward_pooler=pooler).heads["shared"]
    plain.load_state_dict(head.state_dict(), strict=False)
    expected = plain(mixed)["default"]
    torch.testing.assert_close(model.rewards(IDS)["default"], expected)
    batch = dph.pack([[finished(ids)] for ids in IDS])
    torch.testing.assert_close(model.forward_packed(batch).rewards["default"], expected)
    torch.testing.assert_close(model.rewards_of(model.reward_states(batch))["default"], expected)
    model.save_pretrained(tmp_path / "model")
    opened = dph.Model.from_pretrained(tmp_path / "model")
    assert torch.equal(opened.rewards(IDS)["default"], model.rewards(IDS)["default"])
    model.save_head(tmp_path / "head")
    opened.load_head(tmp_path / "head", "again")
    assert torch.equal(opened.rewards(IDS)["again"], model.rewards(IDS)["default"])


def test_a_mix_that_a_checkpoint_lacks_is_untrained(tmp_path):
    tiny_model(num_hidden_layers=3, reward_pooler="identity").save_pretrained(tmp_path)
    model = dph.Model.from_pretrained(tmp_path, reward_layer=[0, 2])
    assert model.untrained_heads == {"default"}
    assert torch.equal(model.heads["shared"].mix.weight, torch.full((2, 16), 2**-0.5))
    with torch.no_grad():
        model.heads["shared"].mix.weight[0, 0] = 1.0  # trained by a loop that we do not know
    model.check_heads("default")


def test_states_of_a_layer_need_no_later_block():
    model, called = tiny_model(reward_layer=1, num_hidden_layers=3), []
    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    assert model.reward_states(dph.pack([[finished(IDS[0])]])).shape == (1, 16)
    assert called == [0]


def test_heads_of_several_layers_share_a_pass():
    model = tiny_model(reward_heads=("a",), task_heads=("b", "c"), num_hidden_layers=3)
    model.heads["task_b"].set_layer(2)
    model.heads["task_c"].set_layer(1)
    assert model.heads.layers == [1, 2, -1]
    states = [x[:, -1] for x in model(IDS, output_hidden_states=True).hidden_states]
    rewards = model.rewards(IDS)
    for name, group, layer in (("a", "shared", -1), ("b", "task_b", 2), ("c", "task_c", 1)):
        torch.testing.assert_close(rewards[name], model.heads[group](states[layer])[name])


def test_figures_of_states_are_saved_and_begin_as_none(tmp_path):
    model = dph.Model(tiny_config(reward_standardised=True))
    standardise = model.heads["shared"].standardise
    assert not standardise.is_fitted
    states = torch.randn(50, 16) * torch.arange(16)  # the first column is constant
    standardise.fit(states)
    assert standardise.is_fitted
    torch.testing.assert_close(standardise.deviation[1:], states.std(0)[1:])
    assert standardise.deviation[0] == 1
    model.save_pretrained(tmp_path)
    opened = dph.Model.from_pretrained(tmp_path)
    assert torch.equal(opened.heads["shared"].standardise.mean, standardise.mean)
    assert not opened.heads["shared"].standardise.mean.requires_grad
    fresh = dph.Model.from_pretrained(tmp_path, task_heads=["new"]).heads["task_new"].standardise
    assert (fresh.mean == 0).all()
    assert (fresh.deviation == 1).all()


@pytest.mark.parametrize("layer", [-2, 2, 1.0, True, [], [1], [1, 1], [0, 2]])
def test_layers_that_are_none(layer):
    with pytest.raises(UserError, match="reward_layer: expected"):
        tiny_model(reward_layer=layer)
