"""Heads that are ensembles: how their members are trained, that they differ, and what their spread is good for."""

import json
import math

import pytest
import torch
from helpers.stages import figures, go, records, same, settings, tiny
from helpers.texts import conversation, small_tokenizer, write_lines

import dph
from dph.cli.main import main
from dph.errors import UserError
from dph.infer.best_of_n import Choice, ranked
from dph.infer.request import Answer
from dph.model import head_file
from dph.model.heads import RewardHead
from dph.train import build, config_schema

TOK = small_tokenizer()
TALKS = [pair.chosen for pair in records("head", 6)]


def ensemble(members=3, **changes):
    return tiny(reward_members=members, **changes)


def vectors(model):
    return model.heads["shared"].reward["default"].weight.detach()


@pytest.mark.parametrize("form", [{}, {"reward_pooler": "identity"}, {"reward_pooler": "t5"}])
def test_the_reward_is_the_mean_of_the_members(form):
    model = ensemble(**form).eval()
    states = torch.randn(5, 16)
    each = model.rewards_of(states, each=True)["default"]
    assert each.shape == (5, 3)
    torch.testing.assert_close(model.rewards_of(states)["default"], each.mean(1))
    for member in range(3):
        single = tiny(**form).eval()
        heads = model.heads.state_dict()
        heads["shared.reward=default.weight"] = vectors(model)[member : member + 1]
        single.heads.load_state_dict(heads)
        torch.testing.assert_close(single.rewards_of(states)["default"], each[:, member])
    hooked = model.heads["shared"].reward["default"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.rewards_of(states, each=True)["default"], each)
    hooked.remove()
    groups = [[dph.chat.encode(talk, TOK)] for talk in TALKS]
    judged = model.judge(groups)
    exact = model.forward_packed(dph.pack(groups))
    assert [one.spreads["default"][0] for one in judged] == pytest.approx(exact.members["default"].std(1).tolist())
    assert all(one.spreads == {} for one in tiny().judge(groups))


@pytest.mark.parametrize("stage", ["head", "align"])
def test_members_differ_since_each_sees_other_pairs(stage, tmp_path):
    model = ensemble()
    with torch.no_grad():
        vectors(model).copy_(vectors(model)[:1].expand(3, -1).clone())  # all the same at the beginning
    result = go(settings(stage, tmp_path / "run"), model=model)
    rows = vectors(result.model)
    assert all(not torch.equal(rows[i], rows[k]) for i in range(3) for k in range(i))
    line = figures(tmp_path / "run")[-1]
    assert "eval/reward_accuracy" in line
    assert any("dph_loss_default_2" in line for line in figures(tmp_path / "run"))


def test_half_of_the_pairs_are_shown_to_each_member():
    recipe = settings("head", "unused", objective__heads=["default", "one"], seed=5)
    form = {"pooler": "identity", "intermediate_size": 24, "dropout": 0.1, "layer": -1, "standardised": False}
    model = ensemble(4, task_heads=["one"], task_head_forms={"one": form})
    stage = build.make_stage(recipe, model, TOK, records("head", 200), {"held out": records("head", 5)})
    pairs = [stage.encode(record) for record in records("head", 200)]
    shown = stage.shown(pairs)
    assert shown.shape == (200, 5)
    assert (shown[:, 4] == 1).all()
    assert set(shown[:, :4].flatten().tolist()) == {0.0, 2.0}
    assert (shown[:, :4].mean(0) - 1).abs().max() < 0.25
    assert torch.equal(stage.shown(pairs[3:5]), shown[3:5])


def test_a_run_resumes_and_its_head_is_loaded(tmp_path, capsys):
    whole = go(settings("head", tmp_path / "whole"), model=ensemble())
    part = settings("head", tmp_path / "part", optimiser__steps=8)
    interrupted = records("head")
    with pytest.raises(RuntimeError):
        go(part, Broken(interrupted, 17), model=ensemble())
    resumed = go(part, model=ensemble(), resume=True)
    same(whole, resumed)
    saved = head_file.read(tmp_path / "whole/heads/default")
    assert saved.form["members"] == 3
    opened = dph.Model.from_pretrained(tmp_path / "whole/model")
    opened.load_head(tmp_path / "whole/heads/default", "again")
    judged = opened.judge([[dph.chat.encode(talk, TOK)] for talk in TALKS])
    for one in judged:
        assert one.rewards["again"] == pytest.approx(one.rewards["default"])
        assert one.spreads["again"] == pytest.approx(one.spreads["default"])
    pairs = write_lines(tmp_path / "pairs.jsonl", {"chosen": TALKS[0], "rejected": TALKS[0][:-1] + TALKS[1][-1:]})
    scored = tmp_path / "scored.jsonl"
    assert main(["score", str(tmp_path / "whole"), str(pairs), "--output", str(scored)]) == 0
    assert "spread" not in capsys.readouterr().out  # nothing that could prefer an answer
    chosen = json.loads(scored.read_text())["scores"]["chosen"]
    assert list(chosen) == ["reward", "spread", "logprob", "mean_logprob"]
    assert chosen["spread"] == pytest.approx(judged[0].spreads["default"][0], abs=1e-5)


class Broken(list):
    """Records of which one cannot be read."""

    def __init__(self, items, after):
        super().__init__(items)
        self.left = after

    def fingerprint(self):
        from dph.data.sources import fingerprint

        return fingerprint(list(self))

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("broken")
        return super().__getitem__(index)


def test_models_and_heads_of_earlier_versions_are_the_same(tmp_path):
    assert "reward_members" not in config_schema.model_fields(tiny().config)
    assert "members" not in tiny().config.head_form("shared")
    assert {name: list(weight.shape) for name, weight in tiny().heads.named_parameters()}[
        "shared.reward.default.weight"
    ] == [1, 16]
    model = build.with_heads(tiny(), settings("head", "unused", objective__ensemble=4).objective)
    assert vectors(model).shape == (4, 16)
    assert model.untrained_heads == {"default"}
    assert build.with_heads(model, settings("head", "unused").objective) is model  # null: the model's
    with pytest.raises(UserError, match="reward_members: expected at most 64, got 65"):
        ensemble(65)
    with pytest.raises(ValueError, match="expected reward_members = 1, as in the released layout"):
        ensemble().save_official(tmp_path)


def test_the_lower_bound_prefers_what_the_members_agree_on(tmp_path, capsys):
    end = dph.chat.markup(TOK).end_of_turn
    figures = zip([-1.0, -2.0, -3.0], [1.0, 3.0, 2.0], [0.1, 2.5, 0.5], strict=True)
    answers = [Answer(i, (end,), True, p, p, {"default": r}, {"default": s}) for i, (p, r, s) in enumerate(figures)]

    def order(**options):
        return [c.reward for c in ranked([1], answers, TOK, Choice(**options))]

    assert order() == [3.0, 2.0, 1.0]
    assert order(rank="lower_bound") == [2.0, 1.0, 3.0]
    assert order(rank="lower_bound", risk=0.0) == [3.0, 2.0, 1.0]
    assert order(rank="logprob") == [1.0, 3.0, 2.0]
    prompt = [{"role": "user", "content": "late"}]
    with pytest.raises(ValueError, match="rank: expected an ensemble"):
        dph.best_of_n(tiny(), TOK, prompt, 2, rank="lower_bound")
    with pytest.raises(ValueError, match="rank: expected one of reward, logprob, lower_bound, vote, got 'best'"):
        dph.best_of_n(tiny(), TOK, prompt, 2, rank="best")
    model = ensemble().eval()
    options = {"max_new_tokens": 12, "seed": 1, "temperature": 2.0}
    candidates = dph.best_of_n(model, TOK, prompt, 12, rank="lower_bound", risk=2.0, **options)
    bounds = [c.reward - 2 * c.spread for c in candidates if c.finished]
    assert bounds == sorted(bounds, reverse=True)
    model.save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "late", "-n", "4", "--max-new-tokens", "8", "--seed", "1"]
    assert main([*words, "--rank", "lower_bound", "--risk", "2", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)["candidates"][0]
    assert {"spread", "reward"} <= fields.keys()
    assert main([*words, "--rank", "lower_bound"]) == 0


def test_the_lower_bound_resists_answers_unlike_those_of_training():
    """Half of the candidates are bad and have parts in directions that no training pair has."""
    torch.manual_seed(0)
    width, seen, members, pairs = 24, 12, 8, 400
    head = RewardHead(["r"], "identity", width, 1, members=members)
    torch.nn.init.normal_(head.reward["r"].weight, std=width**-0.5)
    states = torch.zeros(pairs, 2, width)
    states[..., :seen] = torch.randn(pairs, 2, seen)
    quality = states[..., 0] + 0.5 * torch.randn(pairs, 2)
    better = (quality[:, 0] > quality[:, 1])[:, None, None]
    states = torch.where(better, states, states.flip(1))
    shown = 2.0 * torch.randint(2, (pairs, members))
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        rewards = head(states.flatten(0, 1), each=True)["r"].view(pairs, 2, members)
        terms = torch.nn.functional.logsigmoid(rewards[:, 0]) + torch.nn.functional.logsigmoid(-rewards[:, 1])
        optimiser.zero_grad()
        (-(terms * shown).mean()).backward()
        optimiser.step()
    candidates = torch.zeros(500, 16, width)
    candidates[..., :seen] = torch.randn(500, 16, seen)
    candidates[:, 8:, 0] = -1.0
    candidates[:, 8:, seen:] = 12 * torch.randn(500, 8, width - seen)
    with torch.no_grad():
        each = head(candidates.flatten(0, 1), each=True)["r"].view(500, 16, members)
    mean, spread = each.mean(2), each.std(2)
    chosen_quality = [
        float(candidates[torch.arange(500), score.argmax(1), 0].mean()) for score in (mean, mean - spread)
    ]
    assert spread[:, 8:].mean() > 2 * spread[:, :8].mean()
    assert chosen_quality[1] > chosen_quality[0] + 0.1, chosen_quality
    assert not math.isnan(chosen_quality[0])


def test_a_conversation_has_the_same_score_with_and_without_others():
    model = ensemble().eval()
    talk = conversation("hello", "late fox")
    alone = model.score(TOK, [talk])
    torch.testing.assert_close(model.score(TOK, [*TALKS, talk])[-1:], alone)
