"""The command line answers and judges: what generate, chat, score and evaluate print on a tiny model."""

import io
import json
import math
import re
import sys

import pytest
import torch
from helpers.command_line import ANSWER, ASKED, USER
from helpers.texts import write_lines

import dph
from dph.cli import answers, main
from dph.infer import best_of_n
from dph.infer.request import Answer
from dph.model import loading


def cells(text):
    """The rows of a table, without a note below it."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:] if line != answers.CUT_OFF]


# Answers


ANSWERS = (("is", True), ("not", False), ("gripping", True), ("film film", True), ("a or b", False), ("the", True))


@pytest.fixture
def samples(monkeypatch):
    """In place of sampling: ANSWERS, some of them cut off."""

    def answered(model, tok, requests):
        end = tok.convert_tokens_to_ids(["<|im_end|>"])
        for request in requests:
            for i, (text, finished) in enumerate(ANSWERS[: request.wanted]):
                tokens = tok(text)["input_ids"] + end * finished
                (judged,) = model.judge([[dph.chat.continuation(request.prompt, tokens, tok)]])
                rewards = {head: own[0] for head, own in judged.rewards.items() if finished and request.rewards}
                request.add(Answer(i, tuple(tokens), finished, judged.logprobs[0], judged.mean_logprobs[0], rewards))
            yield request

    monkeypatch.setattr("dph.infer.best_of_n.answered", answered)


def candidates(path, **options):
    """What the API gives for ASKED."""
    model, tok = dph.Model.from_pretrained(path), loading.load_tokenizer(str(path))
    return best_of_n.best_of_n(model, tok, [USER], 6, max_new_tokens=5, seed=3, **options)


def in_json(out):
    """The candidates that ``--json`` shows for one prompt, NaN again for null."""
    (line,) = out.splitlines()
    shown = json.loads(line)["candidates"]
    return [(c["text"], str(math.nan if c["reward"] is None else c["reward"]), c["logprob"]) for c in shown]


def in_order(found):
    """The same of the API's candidates."""
    return [(c.text, str(c.reward), c.logprob) for c in found]


def test_generate_is_best_of_n(dph_command, models):
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    for given, words in (({}, []), (options, flags), ({"head": "short"}, ["--head", "short"])):
        code, out, err = dph_command("generate", models / "judge", *ASKED, *words, "--json")
        assert (code, err) == (0, "")
        assert in_json(out) == in_order(candidates(models / "judge", **given))


def test_generate_ranks_by_reward_or_by_logprob(dph_command, models, samples):
    want = candidates(models / "judge")
    assert [c.finished for c in want] == [True] * 4 + [False] * 2
    code, out, err = dph_command("generate", models / "judge", *ASKED)
    assert (code, err) == (0, "")
    assert [row[0] for row in cells(out)] == list("123456")
    assert out.endswith("\nnot finished: cut off by --max-new-tokens, so without a reward and ranked last\n")
    assert answers.CUT_OFF not in dph_command("generate", models / "judge", *ASKED, "-n", 1)[1]
    assert [row[1] for row in cells(out)] == [f"{c.reward:.3f}" if c.finished else "-" for c in want]
    assert [row[4] for row in cells(out)] == [c.text for c in want]
    by_logprob = sorted(want, key=lambda c: (not c.finished, -c.logprob))
    assert by_logprob != want
    _, out, _ = dph_command("generate", models / "judge", *ASKED, "--rank", "logprob", "--json")
    assert in_json(out) == in_order(by_logprob)


def test_generate_without_a_head_ranks_alike(dph_command, models, samples):
    code, out, _ = dph_command("generate", models / "mute", *ASKED, "--rank", "logprob")
    assert code == 0
    rows = cells(out)
    assert [row[1] for row in rows] == ["-"] * 6
    assert [row[3] for row in rows] == ["yes"] * 4 + ["no"] * 2
    assert {row[4] for row in rows} == {text for text, _ in ANSWERS}
    for part in (rows[:4], rows[4:]):
        assert [float(row[2]) for row in part] == sorted((float(row[2]) for row in part), reverse=True)


def test_the_first_head_is_the_default(dph_command, models, tmp_path):
    model, tok = dph.Model.from_pretrained(models / "judge"), loading.load_tokenizer(str(models / "judge"))
    model.save_head(tmp_path / "head", "short")
    other = dph.Model.from_pretrained(models / "mute")
    other.load_head(tmp_path / "head", "brief", force=True)
    other.save_pretrained(tmp_path / "other")
    tok.save_pretrained(tmp_path / "other")
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    write_lines(tmp_path / "glue/sst2/validation.jsonl", {"sentence": "good", "label": 1})
    task = ["--task", "glue/sst2", "--directory", tmp_path]
    for name, head in (("judge", "default"), ("other", "brief")):
        folder = models / name if name == "judge" else tmp_path / name
        for argv in (["score", folder, rows], ["evaluate", folder, *task], ["generate", folder, *ASKED]):
            code, out, _ = dph_command(*argv, "--json")
            assert code == 0
            assert dph_command(*argv, "--json", "--head", head)[1] == out
    assert dph_command("score", folder, rows, "--head", head, "--logprob-only")[0] == 2


def test_one_answer_needs_no_head(dph_command, models):
    code, out, _ = dph_command("generate", models / "mute", "--prompt", "x", "-n", 1, "--max-new-tokens", 4)
    assert code == 0
    assert [row[:2] for row in cells(out)] == [["1", "-"]]


def test_generate_from_a_file(dph_command, refused, models, tmp_path):
    system = {"role": "system", "content": "be brief"}
    file = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": [USER]}, {"messages": [system, USER]})
    argv = ["generate", models / "judge", "-n", 2, "--max-new-tokens", 3, "--file"]
    code, out, _ = dph_command(*argv, file, "--json")
    assert code == 0
    assert [json.loads(line)["messages"] for line in out.splitlines()] == [
        [{"role": "user", "content": "a"}],
        [USER],
        [system, USER],
    ]
    assert f"{tmp_path / 'x'}: expected a JSONL file, got nothing there" in refused(*argv, tmp_path / "x")
    file = write_lines(tmp_path / "q.jsonl", {"prompt": "a"}, {"messages": [USER, ANSWER]})
    assert f"{file}:2: expected a message to answer at the end" in refused(*argv, file)
    file = write_lines(tmp_path / "r.jsonl", {"text": "a"})
    assert f"{file}:1: expected prompt or messages, got the fields text" in refused(*argv, file)


def test_control_tokens_in_a_prompt_stay_text(dph_command, models):
    prompt = "a<|im_end|>\n<|im_start|>assistant\nyes"
    code, out, _ = dph_command("generate", models / "judge", "--prompt", prompt, "-n", 2, "--json")
    assert code == 0
    assert json.loads(out)["messages"][0]["content"] == prompt


def test_chat_keeps_the_best_and_its_history(dph_command, models, monkeypatch):
    asked = []

    def answer(model, tok, conversations, choice, **options):
        (messages,) = conversations
        asked.append([dict(m) for m in messages])
        texts = [f"answer {len(asked)}\x07", "worse\n\x1b[2J"]
        yield [
            best_of_n.Candidate(text, reward, -3.0, -1.0, finished, (1,))
            for text, reward, finished in zip(texts, (2.0, math.nan), (True, False), strict=True)
        ]

    monkeypatch.setattr("dph.cli.answers.best_of_n_each", answer)
    turns = "/candidates\nfirst\n\n/candidates\n/what\nsecond\n/quit\nthird\n"
    code, out, err = dph_command("chat", models / "judge", "-n", 2, "--system", "be brief", stdin=turns)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "no answers yet"
    assert lines[1] == "answer 1\\x07  [reward 2.000]"
    assert lines[4].split() == ["1", "2.000", "-3.000", "yes", "answer", "1\\x07"]
    assert lines[5].split() == ["2", "-", "-3.000", "no", "worse\\n\\x1b[2J"]
    assert lines[6:] == [answers.CUT_OFF, "expected /candidates or /quit, got '/what'", "answer 2\\x07  [reward 2.000]"]
    system = {"role": "system", "content": "be brief"}
    said = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "answer 1\x07"}]
    assert asked == [[system, said[0]], [system, *said, {"role": "user", "content": "second"}]]


def test_chat_ends_with_its_input(dph_command, models):
    code, out, _ = dph_command("chat", models / "mute", "-n", 1, "--max-new-tokens", 3, stdin="hello\nagain")
    assert code == 0
    assert len(out.splitlines()) >= 2


class Terminal(io.TextIOWrapper):
    """Stdin of a terminal in which these bytes were typed."""

    def __init__(self, typed):
        super().__init__(io.BytesIO(typed), encoding="utf-8")

    def isatty(self):
        return True


def echo(asked, *, stopped=()):
    """In place of best_of_n_each: notes what it was asked, and answers with it unless Ctrl-C comes in its place."""

    def answer(model, tok, conversations, choice, **options):
        asked.append([m["content"] for m in conversations[0]])
        if asked[-1][-1] in stopped:
            raise KeyboardInterrupt
        yield [best_of_n.Candidate(f"re {asked[-1][-1]}", math.nan, -3.0, -1.0, True, (1,))]

    return answer


def test_ctrl_c_in_chat_stops_the_answer_alone(models, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("dph.cli.answers.best_of_n_each", echo(asked, stopped=["second"]))
    monkeypatch.setattr(sys, "stdin", Terminal(b"first\nsecond\n/candidates\nthird\n"))
    assert main.main(["chat", str(models / "judge"), "-n", "1"]) == 0
    assert asked == [["first"], ["first", "re first", "second"], ["first", "re first", "third"]]
    out, err = capsys.readouterr()
    assert "you> \ninterrupted: no answer\nyou> rank" in out
    assert out.count("re first") == 2  # as the answer, and among the candidates after the one that was stopped
    assert out.endswith("you> re third\nyou> ")
    assert err == ""


def test_ctrl_c_ends_chat_where_the_turns_are_a_file_s(dph_command, models, monkeypatch):
    asked = []
    monkeypatch.setattr("dph.cli.answers.best_of_n_each", echo(asked, stopped=["first"]))
    code, out, err = dph_command("chat", models / "judge", "-n", 1, stdin="first\nsecond\n")
    assert (code, out, err) == (130, "", "dph: interrupted\n")
    assert asked == [["first"]]


def test_ctrl_c_at_the_prompt_ends_chat(dph_command, models, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert dph_command("chat", models / "judge", "-n", 1) == (130, "", "dph: interrupted\n")


@pytest.mark.parametrize("stdin", [Terminal, lambda typed: io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")])
def test_a_line_that_is_not_utf_8_is_refused_alone(models, monkeypatch, capsys, stdin):
    asked = []
    monkeypatch.setattr("dph.cli.answers.best_of_n_each", echo(asked))
    monkeypatch.setattr(sys, "stdin", stdin("caf\u00e9\n".encode() + b"caf\xe9\n/\xff\nend\n"))
    assert main.main(["chat", str(models / "judge"), "-n", "1"]) == 0
    assert asked == [["caf\u00e9"], ["caf\u00e9", "re caf\u00e9", "end"]]
    out, err = capsys.readouterr()
    assert out.count("expected text in UTF-8, got 'caf\\udce9'\n") == 1
    assert out.count("expected text in UTF-8, got '/\\udcff'\n") == 1
    assert err == ""


# Judging


def test_score_conversations(dph_command, models, tmp_path):
    longer = [USER, ANSWER, {"role": "user", "content": "why"}, {"role": "assistant", "content": "positive"}]
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]}, {"messages": longer})
    code, out, err = dph_command("score", models / "judge", rows, "--output", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model, tok = dph.Model.from_pretrained(models / "judge"), loading.load_tokenizer(str(models / "judge"))
    want = model.score(tok, [[USER, ANSWER], longer]).tolist()
    assert [line["messages"] for line in lines] == [[USER, ANSWER], longer]
    scores = [line["scores"] for line in lines]
    assert [one["reward"] for one in scores] == pytest.approx(want, abs=1e-5)
    # The log-probability is the final answer's: "positive" and <|im_end|>.
    encoded = dph.chat.encode(longer, tok)
    count = len(tok("positive")["input_ids"]) + 1
    targets = torch.full((1, len(encoded.tokens)), -100)
    first = encoded.reward_position - count
    targets[0, first : first + count] = torch.tensor(encoded.targets[first : first + count])
    with torch.no_grad():
        logits = model(torch.tensor([encoded.tokens])).logits
    assert scores[1]["logprob"] == pytest.approx(dph.losses.sequence_logprobs(logits, targets).item(), abs=1e-4)
    assert cells(out) == [[str(i), *(f"{value:.3f}" for value in one.values())] for i, one in enumerate(scores)]
    assert dph_command("score", models / "judge", rows, "--json")[1].splitlines() == list(map(json.dumps, lines))


def test_score_preferences(dph_command, models, tmp_path):
    answers = ["is gripping", "is not", "watchable", "or"]
    said = [[{"role": "assistant", "content": text}] for text in answers]
    rows = [
        {"prompt": "a film?", "chosen": answers[0], "rejected": answers[1]},
        {"prompt": [USER], "chosen": said[2], "rejected": said[3]},
        {"chosen": [USER, *said[1]], "rejected": [USER, *said[2]]},
        {"prompt": "a film?", "chosen": answers[3], "rejected": answers[3]},
    ]
    file = write_lines(tmp_path / "pairs.jsonl", *rows)
    code, out, _ = dph_command("score", models / "judge", file, "--output", tmp_path / "out.jsonl")
    assert code == 0
    model, tok = dph.Model.from_pretrained(models / "judge"), loading.load_tokenizer(str(models / "judge"))
    rewards = model.score(tok, [[USER, *s] for s in said]).tolist()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "scores"} for line in lines] == rows
    got = [tuple(line["scores"][side]["reward"] for side in ("chosen", "rejected")) for line in lines]
    for pair, (chosen, rejected) in zip(got, [(0, 1), (2, 3), (1, 2), (3, 3)], strict=True):
        assert pair == pytest.approx((rewards[chosen], rewards[rejected]), abs=1e-5)
    table = cells(out)
    assert [row[0] for row in table] == ["reward", "log-probability (sum)", "log-probability (mean)"]
    wins = sum(chosen > rejected for chosen, rejected in got[:3])
    assert table[0][1] == f"{(wins + 0.5) / 4:.3f}"
    assert [row[-2:] for row in table] == [["1", "4"]] * 3  # ties, n
    code, out, _ = dph_command("score", models / "mute", file, "--logprob-only", "--json")
    assert code == 0
    assert [json.loads(line)["method"] for line in out.splitlines()] == [row[0] for row in table[1:]]


def test_an_empty_answer_has_no_mean(dph_command, models, tmp_path):
    empty = {"role": "assistant", "content": ""}
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, empty]}, {"messages": [USER, ANSWER]})
    code, out, err = dph_command("score", models / "judge", rows, "--output", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    assert [[cell == "-" for cell in row] for row in cells(out)] == [[False] * 3 + [True], [False] * 4]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[value is None for value in line["scores"].values()] for line in lines] == [
        [False, False, True],
        [False] * 3,
    ]


def test_a_pair_with_an_empty_answer_is_not_compared_by_the_mean(dph_command, models, tmp_path):
    pairs = [{"prompt": "a", "chosen": "", "rejected": "is"}, {"prompt": "a", "chosen": "is", "rejected": "is"}]
    rows = write_lines(tmp_path / "rows.jsonl", *pairs)
    code, out, err = dph_command("score", models / "judge", rows)
    assert (code, err) == (0, "")
    assert [row[-2:] for row in cells(out)] == [["1", "2"]] * 2 + [["1", "1"]]  # ties, n
    assert cells(out)[2] == ["log-probability (mean)", "0.500", "0.055 to 0.945", "0", "1", "1"]
    code, out, err = dph_command("score", models / "judge", write_lines(tmp_path / "one.jsonl", pairs[0]))
    assert (code, err) == (0, "")
    assert cells(out)[2] == ["log-probability (mean)", "-", "-", "-", "0", "0"]
    code, out, _ = dph_command("score", models / "judge", tmp_path / "one.jsonl", "--json")
    assert (code, json.loads(out.splitlines()[2])["accuracy"]) == (0, None)


@pytest.mark.parametrize("content", ["", "is"])
def test_scores_that_are_no_number_are_an_error(dph_command, models, tmp_path, content):
    model = dph.Model.from_pretrained(models / "judge")
    with torch.no_grad():
        model.backbone.output_norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    loading.load_tokenizer(str(models / "judge")).save_pretrained(tmp_path / "broken")
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, {"role": "assistant", "content": content}]})
    write_lines(tmp_path / "glue/sst2/validation.jsonl", {"sentence": "good", "label": 1})
    evaluate = ["evaluate", tmp_path / "broken", "--task", "glue/sst2", "--directory", tmp_path]
    for argv, where in (
        (["score", tmp_path / "broken", rows], f"{rows}:1: reward"),
        (evaluate, f"{tmp_path}/glue/sst2/validation.jsonl:1: log-probability"),
    ):
        code, out, err = dph_command(*argv)
        assert (code, out) == (1, "")
        assert err.startswith(f"dph: error: {where}: expected finite numbers, got [nan")


def test_every_line_is_judged_by_its_own_form(dph_command, models, tmp_path):
    pair = {"prompt": "a film?", "chosen": "is gripping", "rejected": "is not", "id": 7}
    rows = [
        {"messages": [USER, ANSWER]},
        pair,
        {"prompt": [USER], "completion": "is gripping", "label": False},
        pair | {"messages": [USER]},
        {"prompt": [USER], "completion": [ANSWER], "label": None, "chosen": None},
    ]
    file, output = write_lines(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    code, out, err = dph_command("score", models / "judge", file, "--output", output)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    scores = [line.pop("scores") for line in lines]
    assert lines == rows
    assert [set(one) for one in scores] == [{"reward", "logprob", "mean_logprob"}, {"chosen", "rejected"}] * 2 + [
        {"reward", "logprob", "mean_logprob"}
    ]
    conversations, pairs = out.split("\n\n")
    assert [row[0] for row in cells(conversations)] == ["0", "2", "4"]
    assert [row[-1] for row in cells(pairs)] == ["2"] * 3
    for one in (scores[2], scores[4], scores[1]["chosen"]):
        assert list(one.values()) == pytest.approx(list(scores[0].values()), abs=1e-5)
    shown = dph_command("score", models / "judge", file, "--json")[1].splitlines()
    assert [json.loads(line).get("n") for line in shown] == [None] * 3 + [2] * 3


def test_malformed_files_name_the_line(refused, models, tmp_path):
    argv = ["score", models / "judge"]
    good = json.dumps({"messages": [USER, ANSWER]})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{good}\n\n{{'messages'}}\n")
    assert f"{file}:3: not JSON" in refused(*argv, file)
    file.write_text(f"{good}\n[]\n")
    assert f"{file}:2: expected a JSON object, got list" in refused(*argv, file)
    write_lines(file, {"messages": [USER, ANSWER]}, {"messages": [USER]})
    assert f"{file}:2: expected an assistant message, got a conversation without one" in refused(*argv, file)
    why = {"role": "user", "content": "why"}
    for last in ({"messages": [USER, ANSWER, why]}, {"prompt": [USER, ANSWER], "completion": [why]}):
        write_lines(file, {"messages": [USER, ANSWER]}, last)
        message = refused(*argv, file)
        assert f"{file}:2: " in message
        assert "expected the assistant's answer at the end, got a user message" in message
    write_lines(file, {"messages": [USER, ANSWER]}, {"text": "a"})
    assert f"{file}:2: expected messages, prompt and completion, or chosen and" in refused(*argv, file)
    write_lines(file, {"messages": [USER, ANSWER], "scores": 1})
    taken = refused(*argv, file, "--json")
    assert f"{file}:1: scores: expected no such field, which the output adds; --field NAME names another" in taken
    write_lines(file, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"})
    assert f"{file}:2: expected a preference" in refused(*argv, file)
    file.write_text("")
    assert "expected at least one record, got none" in refused(*argv, file)


def test_evaluate(dph_command, refused, models, tmp_path):
    docs = [{"sentence": text, "label": i % 2} for i, text in enumerate(["good", "not good", "gripping", "is"])]
    write_lines(tmp_path / "glue/sst2/validation.jsonl", *docs)
    argv = ["evaluate", models / "judge", "--task", "glue/sst2", "--directory", tmp_path]
    code, out, err = dph_command(*argv)
    assert (code, err) == (0, "")
    rows = cells(out)
    assert [row[:3] for row in rows] == [["glue/sst2", m, "accuracy"] for m in ("log-probability", "reward")]
    assert [row[-1] for row in rows] == ["4", "4"]
    code, out, _ = dph_command(*argv, "--limit", 3, "--json")
    report = json.loads(out)
    assert (code, report["task"], report["n"]) == (0, "glue/sst2", 3)
    code, out, _ = dph_command("evaluate", models / "mute", *argv[2:], "--logprob-only")
    assert [row[1] for row in cells(out)] == ["log-probability"]
    assert "the nearest is 'glue/sst2'" in refused(*argv[:3], "glue/sst", *argv[4:])
    assert "expected a JSONL file, got nothing" in refused(*argv[:3], "glue/cola", *argv[4:])
    assert "expected split train, validation, test, got 'dev'" in refused(*argv, "--split", "dev")


@pytest.mark.parametrize(
    ("task", "split", "labels"),
    [("glue/ax", [], [-1, -1]), ("glue/mnli", ["--split", "test"], [None, -1]), ("glue/mnli", [], [0, -1])],
)
def test_records_without_labels_get_predictions(dph_command, models, tmp_path, task, split, labels):
    docs = [{"premise": f"film {i}", "hypothesis": "is", "label": label, "idx": 7} for i, label in enumerate(labels)]
    name = "test" if split or task == "glue/ax" else "validation"
    write_lines(tmp_path / f"{task}/{name}.jsonl", *docs)
    argv = ["evaluate", models / "judge", "--task", task, *split, "--directory", tmp_path]
    code, out, err = dph_command(*argv, "--output", tmp_path / "out.jsonl")
    hidden = sum(label in (None, -1) for label in labels)
    assert code == 0
    assert err == (
        f"{task}: {hidden} of 2 records have no label and no part in the metrics; their predictions are in --output\n"
    )
    rows = cells(out)
    assert [row[1] for row in rows] == ["log-probability", "reward"]
    if hidden == 2:
        assert [row[3:] for row in rows] == [["no labels", "-", "0", "0"]] * 2
    else:
        assert [row[-1] for row in rows] == ["1"] * 2
    options = ("True", "Neither", "False")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        assert (line["task"], line["index"], line["record"]) == (task, i, docs[i])
        assert line["gold"] == (labels[i] if labels[i] == 0 else None)
        for method, scores in line["scores"].items():
            best = scores.index(max(scores))
            assert line["predictions"][method] == {"choice": best, "text": options[best]}
    code, out, err = dph_command(*argv, "--json")
    report = json.loads(out)
    assert (report["n"], report["labels"], [row["n"] for row in report["rows"]]) == (2, 2 - hidden, [2 - hidden] * 2)
    assert err.endswith("--output FILE writes their predictions\n")


def test_scores_do_not_take_the_place_of_a_field(dph_command, models, tmp_path):
    row = {"messages": [USER, ANSWER], "scores": [1]}
    file, once, twice = write_lines(tmp_path / "a.jsonl", row), tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    assert dph_command("score", models / "judge", file, "--field", "rewards", "--output", once)[0] == 0
    assert dph_command("score", models / "judge", once, "--field", "again", "--output", twice)[0] == 0
    line = json.loads(twice.read_text())
    assert {key: line[key] for key in row} == row
    assert line["rewards"] == line["again"]


def test_pairs_of_one_prompt_count_as_dependent(dph_command, models, tmp_path):
    """The same pair four times says no more than once; of four prompts it says more."""
    pair = {"chosen": "a or b", "rejected": "the film"}
    alike = write_lines(tmp_path / "alike.jsonl", *[{"prompt": "is it", **pair}] * 4)
    messages = [[USER, {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")]
    whole = write_lines(tmp_path / "whole.jsonl", *[dict(zip(("chosen", "rejected"), messages, strict=True))] * 4)
    others = write_lines(tmp_path / "others.jsonl", *[{"prompt": f"is it {i}", **pair} for i in range(4)])
    widths = []
    for file in (alike, whole, others):
        _, out, _ = dph_command("score", models / "judge", file, "--json", "--logprob-only")
        row = next(row for row in map(json.loads, out.splitlines()) if row.get("accuracy", {}).get("value") in (0, 1))
        widths.append(row["accuracy"]["high"] - row["accuracy"]["low"])
    assert widths[0] == widths[1] > widths[2]
