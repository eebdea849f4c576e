"""Model dph of lm-evaluation-harness: its numbers are the harness's own and ours, by log-probability and by reward."""

import pytest
import torch
from helpers.command_line import save_models
from helpers.harness import samples
from helpers.texts import message
from transformers import AutoTokenizer

import dph
from dph.errors import UserError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.ecosystem

QUESTIONS = [
    {"q": "a film about the sea", "c": ["is good", "dull", "is good and late"], "a": 0},
    {"q": "hello", "c": ["world", "the quick brown fox jumps"], "a": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models")) / "judge"


def requests(contexts=None):
    from lm_eval.api.instance import Instance

    found = []
    for number, question in enumerate(QUESTIONS):
        context = question["q"] if contexts is None else contexts[number]
        for i, choice in enumerate(question["c"]):
            arguments = (context, f" {choice}")
            found.append(Instance("loglikelihood", question, arguments, i, ("mini", number, 1)))
    return found


def harness(folder, **options):
    from dph.evaluate.harness import HarnessModel

    return HarnessModel(pretrained=str(folder), **options)


@pytest.mark.parametrize("max_length", [None, 30])
def test_log_likelihoods_are_those_of_the_harness(folder, max_length):
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(dph.Model.from_pretrained(folder), tokenizer=tokenizer, max_length=max_length, batch_size=2)
    expected = theirs.loglikelihood(requests() + requests(["", ""]), disable_tqdm=True)
    got = harness(folder, max_length=max_length).loglikelihood(requests() + requests(["", ""]), disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("template", [False, True])
def test_by_reward_the_values_are_those_of_score(folder, template):
    lm = harness(folder, choose_by="reward", head="short")
    histories = [[message("user", question["q"])] for question in QUESTIONS]
    contexts = [lm.apply_chat_template(history) for history in histories] if template else None
    got = lm.loglikelihood(requests(contexts))
    conversations = []
    for history, question in zip(histories, QUESTIONS, strict=True):
        conversations += [[*history, message("assistant", choice)] for choice in question["c"]]
    expected = lm.model.score(lm.tokenizer, conversations, head="short")
    assert torch.allclose(torch.tensor([value for value, _ in got]), expected, atol=1e-5)


def test_control_tokens_of_a_task_stay_text(folder):
    lm = harness(folder, choose_by="reward")
    context = lm.apply_chat_template([message("user", "<|im_end|><|im_start|>")])
    encoded = lm._conversation(context, " yes")
    plain = lm._conversation(lm.apply_chat_template([message("user", "x")]), " yes")
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.tokens.count(end) == plain.tokens.count(end)


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(UserError, match="choose_by: expected logprob or reward, got 'length'"):
        harness(folder, choose_by="length")
    with pytest.raises(UserError, match=r"dtype: expected one of float64, .*, got 'auto'"):
        harness(folder, dtype="auto")
    with pytest.raises(ValueError, match="head: expected one of default, short, got 'nope'"):
        harness(folder, choose_by="reward", head="nope")


@pytest.mark.parametrize("choose_by", ["reward", "logprob"])
def test_scores_that_are_no_numbers_choose_nothing(folder, choose_by):
    lm = harness(folder, choose_by=choose_by)
    lm.model.backbone.blocks[0].attention.out.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"request 0: .* expected finite numbers"):
        lm.loglikelihood(requests()[:1], disable_tqdm=True)


def test_the_command_line(folder, tmp_path):
    arguments = ["--model", "dph", "--model_args", f"pretrained={folder},choose_by=reward,head=short"]
    lines = samples(tmp_path, "dph.evaluate.harness", [*arguments, "--apply_chat_template"], *QUESTIONS)
    assert len(lines) == len(QUESTIONS)
    model, tokenizer = dph.Model.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in lines:
        got = [float(response[0][0]) for response in line["resps"]]
        conversations = [[message("user", line["doc"]["q"]), message("assistant", c)] for c in line["doc"]["c"]]
        expected = model.score(tokenizer, conversations, head="short").tolist()
        assert got == pytest.approx(expected, abs=1e-5)
        assert line["acc"] == float(expected.index(max(expected)) == line["doc"]["a"])
