"""The command line, called in this process on a tiny model: what it prints, its exit codes, its one-line errors."""

import dataclasses
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dph
from dph import cli, generate, pretrained, tokenizer
from dph.loop import Result

CORPUS = ["positive or negative? a gripping film is watchable, the film is not"] * 2
SIZES = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
USER, ANSWER = {"role": "user", "content": "a film?"}, {"role": "assistant", "content": "is gripping"}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Directories: a model with a head, one without, and one whose checkpoint lacks its head."""
    folder = tmp_path_factory.mktemp("models")
    tok = tokenizer.from_iterator(CORPUS, 280)
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "im_end_token_id": 3, "num_attention_heads": 2}
    for name, heads in (("judge", ["default", "short"]), ("mute", [])):
        model = dph.Model(dph.ModelConfig(vocab_size=len(tok), reward_heads=heads, **SIZES, **ids))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    model.config.reward_heads = ["default"]
    model.save_pretrained(folder / "fresh")
    tok.save_pretrained(folder / "fresh")
    return folder


@pytest.fixture
def dph_command(capsys, monkeypatch):
    """Run one command line; (exit code, stdout, stderr)."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(dph_command):
    """Run one command line that must end with exit code 2 and a single line; that line."""

    def run(*argv):
        code, out, err = dph_command(*argv)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("dph: error: ")
        return line

    return run


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cells(text):
    """The rows of a table."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:]]


# Help and errors


@pytest.mark.parametrize("command", [[name] for name in cli.COMMANDS] + [["plot", "landscape"], ["plot", "run"]])
def test_help_shows_an_example(dph_command, command):
    code, out, err = dph_command(*command, "--help")
    assert (code, err) == (0, "")
    assert "example" in out
    assert f"\n  dph {' '.join(command)}" in out


def test_help_names_every_command(dph_command):
    code, out, _ = dph_command("--help")
    assert code == 0
    assert all(f"\n    {name}" in out for name in cli.COMMANDS)
    assert dph_command("--version")[:2] == (0, f"dph {dph.__version__}\n")


def test_help_imports_nothing_heavy():
    # With a bare package in place of dph/__init__.py, which is a matter of its own.
    code = (
        "import sys, types; sys.modules['dph'] = bare = types.ModuleType('dph')\n"
        "bare.__path__, bare.__version__ = ['dph'], '0'\n"
        "import dph.cli; code = dph.cli.main(['train', '--help'])\n"
        "sys.exit(code or len({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a command: quickstart, train"),
        (["trian"], "invalid choice: 'trian'"),
        (["doctor", "--fast"], "unknown arguments: --fast"),
        (["train"], "required: recipe (see"),
        (["train", "--resume"], "required: recipe (see"),
        (
            ["generate", "m", "--prompt", "x", "--device", "gpu"],
            "--device: expected auto or a device of this machine (cpu",
        ),
        (["train", "sft", "--output", "x", "surplus"], "unknown arguments: surplus"),
        (["generate", "m"], "--prompt --file is required"),
        (["generate", "m", "--prompt", "x", "-n", "0"], "expected a whole number of at least 1, got '0'"),
        (["plot", "landscape", "--epsilon", "0.7", "-o", "x.png"], "expected 0 < epsilon < 0.5"),
    ],
)
def test_wrong_arguments(refused, argv, message):
    assert message in refused(*argv)


def test_debug_shows_the_traceback_wherever_it_stands(dph_command):
    for argv in (["--debug", "score", "nowhere", "none.jsonl"], ["score", "nowhere", "none.jsonl", "--debug"]):
        code, _, err = dph_command(*argv)
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1] == "dph: error: none.jsonl: expected a JSONL file, got nothing there"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "dph: interrupted"),
        (RuntimeError("loss is NaN\n at step 3"), 1, "dph: error: loss is NaN at step 3"),
        (KeyError("head"), 1, "dph: error: KeyError: 'head' (--debug shows where)"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            2,
            "dph: error: x.json: No such file or directory",
        ),
        (OSError(28, "No space left on device", "y"), 1, "dph: error: y: No space left on device"),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(dph_command, monkeypatch, error, code, line):
    def fail(args):
        raise error

    monkeypatch.setattr("dph.commands.files.doctor", fail)
    assert dph_command("doctor") == (code, "", line + "\n" if line else "")


def test_a_closed_pipe_is_no_traceback(models, tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", *[{"messages": [USER, ANSWER]}] * 2000)
    command = [sys.executable, "-m", "dph.cli", "score", str(models / "judge"), str(rows), "--json"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


# Models


def test_a_missing_model_is_one_line_and_never_the_network(refused, models, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.ModelConfig, "get_config_dict", lambda path: pytest.fail(f"{path} was asked for"))
    rows = jsonl(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    sst2 = jsonl(tmp_path / "validation.jsonl", {"sentence": "good", "label": 1})
    (tmp_path / "glue/sst2").mkdir(parents=True)
    sst2.rename(tmp_path / "glue/sst2/validation.jsonl")
    for argv in (
        ["generate", "nowhere", "--prompt", "x"],
        ["chat", "runs/sft/model"],
        ["chat", "./nowhere"],
        ["score", "/nowhere/model", rows],
        ["evaluate", "nowhere", "--task", "glue/sst2", "--directory", tmp_path],
        ["convert", "nowhere", tmp_path / "new", "--to", "own"],
    ):
        assert "expected the directory of a model, got nothing there" in refused(*argv)
    assert "got one without config.json" in refused("chat", tmp_path)
    assert "got a file there" in refused("chat", rows)
    assert not (tmp_path / "new").exists()


def test_a_hub_name_lets_the_error_of_transformers_through(refused, monkeypatch):
    def offline(path):
        raise OSError(f"no connection\nwhile asking for {path}")

    monkeypatch.setattr(pretrained.ModelConfig, "get_config_dict", offline)
    assert refused("chat", "owner/model") == "dph: error: owner/model: no connection while asking for owner/model"


def test_a_run_directory_stands_for_its_model(dph_command, refused, models, tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "sft"}')
    assert "a run that is not finished holds no model" in refused("chat", tmp_path)
    shutil.copytree(models / "judge", tmp_path / "model")
    argv = ["--prompt", "x", "-n", 2, "--max-new-tokens", 2, "--seed", 1]
    run, model = (dph_command("generate", path, *argv) for path in (tmp_path, tmp_path / "model"))
    assert run[0] == 0
    assert run == model


def test_other_models_and_missing_tokenizers_are_refused(refused, models, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert "expected a model of type dph or lsw_transformer, got opt" in refused("chat", tmp_path)
    dph.Model.from_pretrained(models / "judge").save_pretrained(tmp_path / "bare")
    assert "got one without tokenizer.json" in refused("generate", tmp_path / "bare", "--prompt", "x")


@pytest.mark.parametrize("name", ["mute", "fresh"])
def test_rewards_of_a_model_without_a_head(refused, models, tmp_path, name):
    rows = jsonl(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    why = {"mute": "got one without", "fresh": "the checkpoint holds no weights for it"}[name]
    for argv in (["generate", models / name, "--prompt", "x"], ["chat", models / name]):
        line = refused(*argv)
        assert why in line
        assert "--rank logprob" in line
    line = refused("score", models / name, rows)
    assert why in line
    assert "--logprob-only" in line


def test_an_unknown_head_is_refused(refused, models):
    assert "expected one of default, short, got 'long'" in refused("chat", models / "judge", "--head", "long")


# Answers


ASKED = ["--prompt", USER["content"], "-n", 6, "--max-new-tokens", 5, "--seed", 3]
ANSWERS = (("is", True), ("not", False), ("gripping", True), ("film film", True), ("a or b", False), ("the", True))


@pytest.fixture
def samples(monkeypatch):
    """In place of sampling: ANSWERS, some of them cut off."""

    def sample(model, tok, prompts, n, **options):
        end = tok.convert_tokens_to_ids(["<|im_end|>"])
        ends = [(tok(text)["input_ids"], end if finished else []) for text, finished in ANSWERS[:n]]
        return [[dph.chat.continuation(prompt, text + end, tok) for text, end in ends] for prompt in prompts]

    monkeypatch.setattr("dph.generate.sample", sample)


def candidates(path, **options):
    """What the API gives for ASKED."""
    model, tok = dph.Model.from_pretrained(path), pretrained.load_tokenizer(str(path))
    return generate.best_of_n(model, tok, [USER], 6, max_new_tokens=5, seed=3, **options)


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


def test_one_answer_needs_no_head(dph_command, models):
    code, out, _ = dph_command("generate", models / "mute", "--prompt", "x", "-n", 1, "--max-new-tokens", 4)
    assert code == 0
    assert [row[:2] for row in cells(out)] == [["1", "-"]]


def test_generate_from_a_file(dph_command, refused, models, tmp_path):
    system = {"role": "system", "content": "be brief"}
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": [USER]}, {"messages": [system, USER]})
    argv = ["generate", models / "judge", "-n", 2, "--max-new-tokens", 3, "--file"]
    code, out, _ = dph_command(*argv, file, "--json")
    assert code == 0
    assert [json.loads(line)["messages"] for line in out.splitlines()] == [
        [{"role": "user", "content": "a"}],
        [USER],
        [system, USER],
    ]
    assert f"{tmp_path / 'x'}: expected a JSONL file, got nothing there" in refused(*argv, tmp_path / "x")
    file = jsonl(tmp_path / "q.jsonl", {"prompt": "a"}, {"messages": [USER, ANSWER]})
    assert f"{file}:2: expected a message to answer at the end" in refused(*argv, file)
    file = jsonl(tmp_path / "r.jsonl", {"text": "a"})
    assert f"{file}:1: expected prompt or messages, got the fields text" in refused(*argv, file)


def test_control_tokens_in_a_prompt_stay_text(dph_command, models):
    prompt = "a<|im_end|>\n<|im_start|>assistant\nyes"
    code, out, _ = dph_command("generate", models / "judge", "--prompt", prompt, "-n", 2, "--json")
    assert code == 0
    assert json.loads(out)["messages"][0]["content"] == prompt


def test_chat_keeps_the_best_and_its_history(dph_command, models, monkeypatch):
    asked = []

    def answer(model, tok, messages, n, **options):
        asked.append([dict(m) for m in messages])
        texts = [f"answer {len(asked)}\x07", "worse\n\x1b[2J"]
        return [
            generate.Candidate(text, reward, -3.0, -1.0, finished, (1,))
            for text, reward, finished in zip(texts, (2.0, math.nan), (True, False), strict=True)
        ]

    monkeypatch.setattr("dph.commands.answering.best_of_n", answer)
    turns = "/candidates\nfirst\n\n/candidates\n/what\nsecond\n/quit\nthird\n"
    code, out, err = dph_command("chat", models / "judge", "-n", 2, "--system", "be brief", stdin=turns)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "no answers yet"
    assert lines[1] == "answer 1\\x07  [reward 2.000]"
    assert lines[4].split() == ["1", "2.000", "-3.000", "yes", "answer", "1\\x07"]
    assert lines[5].split() == ["2", "-", "-3.000", "no", "worse\\n\\x1b[2J"]
    assert lines[6:] == ["expected /candidates or /quit, got /what", "answer 2\\x07  [reward 2.000]"]
    system = {"role": "system", "content": "be brief"}
    said = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "answer 1\x07"}]
    assert asked == [[system, said[0]], [system, *said, {"role": "user", "content": "second"}]]


def test_chat_ends_with_its_input(dph_command, models):
    code, out, _ = dph_command("chat", models / "mute", "-n", 1, "--max-new-tokens", 3, stdin="hello\nagain")
    assert code == 0
    assert len(out.splitlines()) >= 2


# Judging


def test_score_conversations(dph_command, models, tmp_path):
    longer = [USER, ANSWER, {"role": "user", "content": "why"}, {"role": "assistant", "content": "positive"}]
    rows = jsonl(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]}, {"messages": longer})
    code, out, err = dph_command("score", models / "judge", rows, "--output", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model, tok = dph.Model.from_pretrained(models / "judge"), pretrained.load_tokenizer(str(models / "judge"))
    want = model.score(tok, [[USER, ANSWER], longer]).tolist()
    assert [line["reward"] for line in lines] == pytest.approx(want, abs=1e-5)
    # The log-probability is the final answer's: "positive" and <|im_end|>.
    encoded = dph.chat.encode(longer, tok)
    count = len(tok("positive")["input_ids"]) + 1
    targets = torch.full((1, len(encoded.tokens)), -100)
    first = encoded.reward_position - count
    targets[0, first : first + count] = torch.tensor(encoded.targets[first : first + count])
    with torch.no_grad():
        logits = model(torch.tensor([encoded.tokens])).logits
    assert lines[1]["logprob"] == pytest.approx(dph.losses.sequence_logprobs(logits, targets).item(), abs=1e-4)
    assert cells(out) == [[str(i), *(f"{value:.3f}" for value in line.values())] for i, line in enumerate(lines)]
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
    file = jsonl(tmp_path / "pairs.jsonl", *rows)
    code, out, _ = dph_command("score", models / "judge", file, "--output", tmp_path / "out.jsonl")
    assert code == 0
    model, tok = dph.Model.from_pretrained(models / "judge"), pretrained.load_tokenizer(str(models / "judge"))
    rewards = model.score(tok, [[USER, *s] for s in said]).tolist()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    got = [(line["chosen"]["reward"], line["rejected"]["reward"]) for line in lines]
    for pair, (chosen, rejected) in zip(got, [(0, 1), (2, 3), (1, 2), (3, 3)], strict=True):
        assert pair == pytest.approx((rewards[chosen], rewards[rejected]), abs=1e-5)
    table = cells(out)
    assert [row[0] for row in table] == ["reward", "log-probability (sum)", "log-probability (mean)"]
    wins = sum(chosen > rejected for chosen, rejected in got[:3])
    assert table[0][1] == f"{(wins + 0.5) / 4:.3f}"
    assert [row[-3:] for row in table] == [["1", "0", "4"]] * 3  # ties, NaN, n
    code, out, _ = dph_command("score", models / "mute", file, "--logprob-only", "--json")
    assert code == 0
    assert [json.loads(line)["method"] for line in out.splitlines()] == [row[0] for row in table[1:]]


def test_an_empty_answer_has_no_mean_and_is_reported(dph_command, models, tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "", "rejected": "is"})
    code, out, err = dph_command("score", models / "judge", rows)
    assert code == 1
    assert cells(out)[2] == ["log-probability (mean)", "0.000", "0.000 to 0.793", "-", "0", "1", "1"]
    assert err == "dph: error: 1 scores are not a number (NaN); where there was a choice they count as wrong\n"


def test_malformed_files_name_the_line(refused, models, tmp_path):
    argv = ["score", models / "judge"]
    good = json.dumps({"messages": [USER, ANSWER]})
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{good}\n\n{{'messages'}}\n")
    assert f"{file}:3: not JSON" in refused(*argv, file)
    file.write_text(f"{good}\n[]\n")
    assert f"{file}:2: expected a JSON object, got list" in refused(*argv, file)
    jsonl(file, {"messages": [USER, ANSWER]}, {"messages": [USER]})
    assert f"{file}:2: expected an assistant message, got a conversation without one" in refused(*argv, file)
    jsonl(file, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"})
    assert f"{file}:2: expected a preference" in refused(*argv, file)
    file.write_text("")
    assert "expected at least one record, got none" in refused(*argv, file)


def test_evaluate(dph_command, refused, models, tmp_path):
    (tmp_path / "glue/sst2").mkdir(parents=True)
    docs = [{"sentence": text, "label": i % 2} for i, text in enumerate(["good", "not good", "gripping", "is"])]
    jsonl(tmp_path / "glue/sst2/validation.jsonl", *docs)
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


# Files


def test_convert_both_ways(dph_command, refused, shared, tmp_path):
    released = shared / "golden/checkpoint"
    own, back = tmp_path / "own", tmp_path / "back"
    code, out, err = dph_command("convert", released, own, "--to", "own")
    assert (code, err) == (0, "")
    assert "tokenizer.json" in out
    assert json.loads((own / "config.json").read_text())["model_type"] == "dph"
    assert dph_command("convert", own, back, "--to", "official")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (own / name).read_bytes() == (released / name).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (released, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((back / "config.json").read_text())
    given = json.loads((released / "config.json").read_text())
    assert all(config[key] == given[key] for key in dph.checkpoint.RENAMED_CONFIG if key in given)
    assert "expected a new or empty directory" in refused("convert", released, own, "--to", "own")


def test_convert_leaves_out_heads_without_weights(dph_command, models, tmp_path):
    code, _, err = dph_command("convert", models / "fresh", tmp_path / "out", "--to", "official")
    assert code == 0
    assert "reward heads without weights are left out: default" in err
    assert dph.Model.from_pretrained(tmp_path / "out").head_names == []
    assert not [key for key in load_file(tmp_path / "out/model.safetensors") if "reward" in key]


def test_tokenizer(dph_command, refused, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    code, out, _ = dph_command("tokenizer", corpus, "--vocab-size", 270, "--output", tmp_path / "tok")
    assert code == 0
    tok = pretrained.load_tokenizer(str(tmp_path / "tok"))
    assert out == f"{tmp_path / 'tok'}: {len(tok)} tokens\n"
    assert dph.chat.encode([USER, ANSWER], tok).reward_position is not None
    assert "expected a directory without a tokenizer" in refused("tokenizer", corpus, "--output", tmp_path / "tok")
    assert "missing.txt" in refused("tokenizer", tmp_path / "missing.txt", "--output", tmp_path / "new")


def test_plot(dph_command, refused, tmp_path):
    for argv in (["landscape", "--epsilon", "0.1", "0.2"], ["run", tmp_path]):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        code, out, _ = dph_command("plot", *argv, "-o", tmp_path / "x.png")
        assert (code, out) == (0, f"{tmp_path / 'x.png'}\n")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "No such file or directory" in refused("plot", "landscape", "-o", tmp_path / "no/x.png")


def test_doctor(dph_command):
    code, out, _ = dph_command("doctor")
    assert code == 0
    assert torch.__version__.split("+")[0] in out
    assert "linear_logprob" in out


# Training


def test_train_hands_over_recipe_overrides_and_output(dph_command, monkeypatch, tmp_path):
    calls, result = [], [Result(None, None, tmp_path, 7, False, 0, {})]
    monkeypatch.setattr("dph.trainer.train", lambda recipe, resume: calls.append((recipe, resume)) or result[0])
    argv = ["train", "sft", "optimiser.steps=7", "--output", tmp_path / "a b: c", "optimiser.warmup=0", "--resume"]
    code, _, err = dph_command(*argv, "seed=5")
    assert (code, err) == (0, "")
    ((recipe, resume),) = calls
    assert resume
    assert (recipe.stage, recipe.seed, recipe.optimiser.steps, recipe.optimiser.warmup) == ("sft", 5, 7, 0)
    assert recipe.output.directory == str(tmp_path / "a b: c")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (0, 143)):  # 0: another process was told
        result[0] = dataclasses.replace(result[0], interrupted=True, signal=number)
        assert dph_command(*argv)[0] == code


def test_wrong_recipes(refused, tmp_path):
    assert "did you mean optimiser.steps?" in refused("train", "sft", "optimiser.stpes=3")
    (tmp_path / "r.yaml").write_text("stage: sft\noptimizer: {lr: 1e-4}\n")
    line = refused("train", tmp_path / "r.yaml")
    assert "optimizer: unknown key" in line
    assert "optimiser" in line
    assert "expected a file or one of a100-align" in refused("train", tmp_path / "none.yaml")


def test_a_path_below_a_folder_that_is_here_is_no_hub_name(tmp_path, monkeypatch, refused):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "runs/nope: expected the directory of a model, got nothing" in refused("generate", "runs/nope", *ASKED)
