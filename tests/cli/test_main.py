"""The command line, called in this process: help, exit codes, one-line errors, models, files, and training."""

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from helpers.command_line import ANSWER, ASKED, CORPUS, USER
from helpers.texts import write_lines
from safetensors.torch import load_file

import dph
from dph.cli import main
from dph.errors import UserError
from dph.model import config, directories, loading
from dph.train.trainer import Result

# Help and errors


@pytest.mark.parametrize("command", [[name] for name in main.COMMANDS] + [["plot", "landscape"], ["plot", "run"]])
def test_help_shows_an_example(dph_command, command):
    code, out, err = dph_command(*command, "--help")
    assert (code, err) == (0, "")
    assert "example" in out
    assert f"\n  dph {' '.join(command)}" in out


def test_help_of_score_says_what_the_mean_is_of(dph_command):
    assert "The mean is per content\ntoken and leaves out the end-of-turn token" in dph_command("score", "--help")[1]


def test_help_names_every_command(dph_command):
    code, out, _ = dph_command("--help")
    assert code == 0
    assert all(f"\n    {name}" in out for name in main.COMMANDS)
    assert dph_command("--version")[:2] == (0, f"dph {dph.__version__}\n")


# Started as the script that pip makes, and as a module.
STARTS = {
    "script": f"import sys; sys.argv = [{sysconfig.get_path('scripts') + '/dph'!r}]\n",
    "module": "import sys; sys.argv, sys.orig_argv = ['-m'], [*sys.orig_argv, '-m', 'dph.cli']\n",
}


def started(how, code):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", STARTS[how] + code]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("how", STARTS)
def test_help_imports_nothing_heavy(how):
    code = (
        "import dph.cli.main; code = dph.cli.main.main(['train', '--help'])\n"
        "sys.exit(code or len({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert started(how, code).returncode == 0


@pytest.mark.parametrize("how", STARTS)
def test_ctrl_c_while_pytorch_is_imported(how):
    code = (
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "import dph.cli.main; sys.meta_path.insert(0, Interrupted()); sys.exit(dph.cli.main.main(['doctor']))"
    )
    done = started(how, code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "dph: interrupted\n")


def test_the_package_is_whole_elsewhere():
    """In somebody else's script of that name, too."""
    code = "import sys; sys.argv = ['elsewhere/dph']; import dph; print(*(n for n in dph.__all__ if hasattr(dph, n)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == dph.__all__, done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a command: quickstart, data, train"),
        (["trian"], "invalid choice: 'trian'"),
        (["doctor", "--fast"], "unknown arguments: --fast (see dph doctor --help)"),
        (["train", "sft", "--resum"], "given as key.name=value (see dph train --help)"),
        (["plot", "run", "x", "-o", "x.png", "--log"], "unknown arguments: --log (see dph plot run --help)"),
        (["train"], "required: recipe (see"),
        (["train", "--resume"], "required: recipe (see"),
        (
            ["generate", "m", "--prompt", "x", "--device", "gpu"],
            "--device: expected auto or a device of this machine (cpu",
        ),
        (["train", "sft", "--output", "x", "surplus"], "unknown arguments: surplus"),
        (
            ["train", "sft", "--steps", "3", "data.sources=[x]", "--resume", "seed=1"],
            "unknown arguments: --steps 3; a recipe's values are given as key.name=value (see",
        ),
        (["generate", "m"], "--prompt --file is required"),
        (["generate", "m", "--prompt", "x", "-n", "0"], "expected a whole number of at least 1, got '0'"),
        (["generate", "m", "--prompt", "x", "-n", "2.5"], "expected a whole number of at least 1, got '2.5'"),
        (["chat", "m", "--temperature", "-1"], "--temperature: expected a finite number of at least 0, got '-1'"),
        (["chat", "m", "--temperature", "nan"], "--temperature: expected a finite number of at least 0, got 'nan'"),
        (["chat", "m", "--temperature", "inf"], "--temperature: expected a finite number of at least 0, got 'inf'"),
        (["generate", "m", "--prompt", "x", "--top-p", "3"], "--top-p: expected a number above 0 and at most 1, got"),
        (["chat", "m", "--top-p", "0"], "--top-p: expected a number above 0 and at most 1, got '0'"),
        (["chat", "m", "--top-k", "-1"], "--top-k: expected a whole number of at least 0, got '-1'"),
        (["chat", "m", "--max-new-tokens", "0"], "--max-new-tokens: expected a whole number of at least 1, got '0'"),
        (["chat", "m", "--seed", "9" * 20], "--seed: expected a whole number of at least -2**63 and below 2**63, got"),
        (["chat", "m", "--seed", "x"], "--seed: expected a whole number of at least -2**63 and below 2**63, got 'x'"),
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
        (
            OSError(28, "No space left on device", "\x1b[2J\n\udcff"),
            1,
            "dph: error: \\x1b[2J\\n\\udcff: No space left on device",
        ),
        (FileNotFoundError(2, "No such file or directory", ""), 2, "dph: error: '': No such file or directory"),
        (ValueError("a\x9b\u2028b\r\nc\u202e\ud800"), 2, "dph: error: a\\x9b b c\\u202e\\ud800"),
        (ValueError(f"{'x' * 9999} y"), 2, f"dph: error: {'x' * 225}...{'x' * 75} y"),
        (ValueError("x " * 9999), 2, f"dph: error: {'x ' * 750}...{' x' * 250}"),
        (MemoryError(), 1, "dph: error: MemoryError (--debug shows where)"),
        (BrokenPipeError(32, "Broken pipe", "fifo"), 1, "dph: error: fifo: Broken pipe"),
        (SystemExit("a reason"), 1, "dph: error: a reason"),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(dph_command, monkeypatch, error, code, line):
    def fail(args):
        raise error

    monkeypatch.setattr("dph.cli.doctor.run", fail)
    assert dph_command("doctor") == (code, "", line + "\n" if line else "")


def test_a_closed_pipe_is_no_traceback(models, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", *[{"messages": [USER, ANSWER]}] * 2000)
    command = [sys.executable, "-m", "dph.cli", "score", str(models / "judge"), str(rows), "--json"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


# Models


def test_a_missing_model_is_one_line_and_never_the_network(refused, models, tmp_path, monkeypatch):
    monkeypatch.setattr(config.ModelConfig, "get_config_dict", lambda path: pytest.fail(f"{path} was asked for"))
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    sst2 = write_lines(tmp_path / "validation.jsonl", {"sentence": "good", "label": 1})
    (tmp_path / "glue/sst2").mkdir(parents=True)
    sst2.rename(tmp_path / "glue/sst2/validation.jsonl")
    for argv in (
        ["generate", "nowhere", "--prompt", "x"],
        ["chat", "runs/sft/model"],
        ["chat", "./nowhere"],
        ["chat", "runs/nowhere"],  # though no runs is here
        ["score", "/nowhere/model", rows],
        ["evaluate", "nowhere", "--task", "glue/sst2", "--directory", tmp_path],
        ["convert", "nowhere", tmp_path / "new", "--to", "own"],
    ):
        assert "expected the directory of a model, got nothing there" in refused(*argv)
    assert "got one without config.json" in refused("chat", tmp_path)
    assert "got a file there" in refused("chat", rows)
    assert not (tmp_path / "new").exists()


def test_a_hub_name_is_announced_and_lets_the_error_of_transformers_through(refused, monkeypatch, caplog):
    def offline(path, **_):
        raise OSError(f"no connection\nwhile asking for {path}")

    monkeypatch.setattr(loading, "read_fields", offline)
    directories._announce.cache_clear()
    assert refused("chat", "owner/model") == (
        "dph: error: owner/model: expected a model in a directory (nothing is there) or on the hub, "
        "got no connection while asking for owner/model"
    )
    assert [record.getMessage().split(";")[0] for record in caplog.records] == ["owner/model: no such directory here"]
    assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)


def test_a_run_directory_stands_for_its_model(dph_command, refused, models, tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "sft"}')
    assert "a run that is not finished holds no model" in refused("chat", tmp_path)
    with pytest.raises(UserError, match=r"a config.json without a model_type \(a run that is not finished"):
        dph.Model.from_pretrained(tmp_path)
    shutil.copytree(models / "judge", tmp_path / "model")
    argv = ["--prompt", "x", "-n", 2, "--max-new-tokens", 2, "--seed", 1]
    with pytest.raises(UserError, match=f"got the directory of a run: give {tmp_path}/model$"):
        dph.Model.from_pretrained(tmp_path)
    run, model = (dph_command("generate", path, *argv) for path in (tmp_path, tmp_path / "model"))
    assert run[0] == 0
    assert run == model


def test_other_models_and_missing_tokenizers_are_refused(refused, models, tmp_path):
    for kind, words in (
        ("other", "expected a model of type dph, lsw_transformer, llama, mistral, qwen2, qwen3, got other"),
        ("opt", "expected weights in model.safetensors or model.safetensors.index.json, got none of them"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert words in refused("chat", tmp_path)
    dph.Model.from_pretrained(models / "judge").save_pretrained(tmp_path / "bare")
    assert "got one without tokenizer.json" in refused("generate", tmp_path / "bare", "--prompt", "x")


@pytest.mark.parametrize("name", ["mute", "fresh"])
def test_rewards_of_a_model_without_a_head(refused, models, tmp_path, name):
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    why = {"mute": "got one without", "fresh": "the checkpoint holds no weights for it"}[name]
    for argv in (["generate", models / name, "--prompt", "x"], ["chat", models / name]):
        line = refused(*argv)
        assert why in line
        assert "--rank logprob" in line
    line = refused("score", models / name, rows)
    assert why in line
    assert "--logprob-only" in line


@pytest.mark.parametrize("output", ["rows.jsonl", "./rows.jsonl", "hard.jsonl", "link.jsonl", "model/config.json"])
def test_an_output_that_is_an_input_is_refused(refused, models, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    (tmp_path / "hard.jsonl").hardlink_to(rows)
    (tmp_path / "link.jsonl").symlink_to(rows)
    (tmp_path / "model").symlink_to(models / "judge")
    before = Path(output).read_bytes()
    line = refused("score", "model", "rows.jsonl", "--output", output)
    assert line.startswith("dph: error: --output: expected another file than the input ")
    assert line.endswith(f", got {output}, the same file")
    assert Path(output).read_bytes() == before


def test_stdout_that_is_the_input_is_refused(tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", {"prompt": "x", "messages": [USER, ANSWER]})
    before = rows.read_bytes()
    for words in (["score", "model", rows], ["generate", "model", "--file", rows]):
        with rows.open("ab") as stdout:
            command = [sys.executable, "-m", "dph.cli", *map(str, words)]
            done = subprocess.run(
                command, cwd=Path(__file__).parents[2], stdout=stdout, stderr=subprocess.PIPE, text=True
            )
        assert (done.returncode, rows.read_bytes()) == (2, before)
        assert done.stderr.startswith("dph: error: stdout: expected another file than the input ")


def test_a_failed_command_leaves_old_results(dph_command, models, tmp_path, monkeypatch):
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    (tmp_path / "out.jsonl").write_text("old")
    argv = ["score", models / "judge", rows, "--output", tmp_path / "out.jsonl"]

    def full(scores):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dph.cli.common.json_line", full)
    code, out, err = dph_command(*argv)
    assert (code, out, err) == (1, "", f"dph: error: {tmp_path / 'out.jsonl'}: No space left on device\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_a_conversion_that_fails_leaves_nothing(dph_command, models, tmp_path, monkeypatch):
    def full(model, folder):
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dph.Model.save_pretrained", full)
    code, _, err = dph_command("convert", models / "judge", tmp_path / "out", "--to", "own")
    assert (code, err) == (1, f"dph: error: {tmp_path / 'out'}: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_convert_and_tokenizer_into_a_folder_that_exists(dph_command, models, tmp_path):
    (tmp_path / "out").mkdir()
    folder = (tmp_path / "out").stat().st_ino
    assert dph_command("convert", models / "judge", tmp_path / "out", "--to", "own")[0] == 0
    assert (tmp_path / "out").stat().st_ino == folder
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    dph.Model.from_pretrained(tmp_path / "out")


def test_an_unknown_head_is_refused(refused, models):
    assert "expected one of default, short, got 'long'" in refused("chat", models / "judge", "--head", "long")
    line = refused("chat", models / "judge", "--head", "runs/gone")
    assert (
        "--head: expected one of default, short or the directory of a head or a run with heads, got runs/gone" in line
    )


def test_a_path_below_a_folder_that_is_here_is_no_hub_name(tmp_path, monkeypatch, refused):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "runs/nope: expected the directory of a model, got nothing" in refused("generate", "runs/nope", *ASKED)


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
    modes = {(own / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1, "the weights are not to be read by whom the configuration is"
    before, after = (load_file(folder / "model.safetensors") for folder in (released, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((back / "config.json").read_text())
    given = json.loads((released / "config.json").read_text())
    assert all(config[key] == given[key] for key in dph.checkpoint.RENAMED_CONFIG if key in given)
    assert "expected a new or empty directory" in refused("convert", released, own, "--to", "own")


def test_convert_to_official_names_the_chat_tokens(dph_command, models, tmp_path):
    assert dph_command("convert", models / "judge", tmp_path / "out", "--to", "official")[0] == 0
    ours, theirs = (loading.load_tokenizer(str(path)) for path in (models / "judge", tmp_path / "out"))
    assert (ours.cls_token, ours.sep_token) == (None, None)
    assert (theirs.cls_token, theirs.sep_token) == ("<|im_end|>", "<|im_start|>")
    assert dph.chat.encode([USER, ANSWER], theirs) == dph.chat.encode([USER, ANSWER], ours)
    assert dph_command("convert", tmp_path / "out", tmp_path / "again", "--to", "official")[0] == 0
    before, after = ((tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("out", "again"))
    assert before == after


def test_convert_leaves_out_heads_without_weights(dph_command, models, tmp_path):
    code, _, err = dph_command("convert", models / "fresh", tmp_path / "out", "--to", "official")
    assert code == 0
    assert "reward heads without weights are left out: default" in err
    assert dph.Model.from_pretrained(tmp_path / "out").head_names == []
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert (fields["architectures"], fields["reward_heads"]) == (["LSWTForCausalLM"], None)
    assert not [key for key in load_file(tmp_path / "out/model.safetensors") if "reward" in key]


def test_tokenizer(dph_command, refused, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    code, out, _ = dph_command("tokenizer", corpus, "--vocab-size", 270, "--output", tmp_path / "tok")
    assert code == 0
    tok = loading.load_tokenizer(str(tmp_path / "tok"))
    assert out == f"{tmp_path / 'tok'}: {len(tok)} tokens\n"
    assert dph.chat.encode([USER, ANSWER], tok).reward_position is not None
    assert "expected a directory without a tokenizer" in refused("tokenizer", corpus, "--output", tmp_path / "tok")
    assert "missing.txt" in refused("tokenizer", tmp_path / "missing.txt", "--output", tmp_path / "new")
    (tmp_path / "a.csv").write_text("id,title\nquokka,zebra zebra\n")
    line = refused("tokenizer", tmp_path / "a.csv", "--output", tmp_path / "new")
    assert "a.csv:2: expected a text in text, messages, " in line
    assert dph_command("tokenizer", tmp_path / "a.csv", "--field", "title", "--output", tmp_path / "new")[0] == 0
    words = loading.load_tokenizer(str(tmp_path / "new")).get_vocab()
    assert {"zebra", "quokka"} & words.keys() == {"zebra"}
    line = refused("tokenizer", "task:glue/sst2", "--field", "title", "--output", tmp_path / "other")
    assert line.endswith("--field: expected none for task:glue/sst2, whose fields are known, got title")


def test_plot(dph_command, refused, tmp_path):
    for argv in (["landscape", "--epsilon", "0.1", "0.2"], ["run", tmp_path]):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        code, out, _ = dph_command("plot", *argv, "-o", tmp_path / "x.png")
        assert (code, out) == (0, f"{tmp_path / 'x.png'}\n")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    for name in ("x.xyz", "png"):
        line = refused("plot", "run", tmp_path / "nowhere", "-o", name)
        assert line.startswith("dph: error: --output: expected a file that ends in .")
        assert ", .png, " in line
        assert line.endswith(f", got {name}")
    assert dph_command("plot", "run", tmp_path, "-o", tmp_path / "X.SVG")[0] == 0
    assert "No such file or directory" in refused("plot", "landscape", "-o", tmp_path / "no/x.png")


def test_doctor(dph_command):
    code, out, _ = dph_command("doctor")
    assert code == 0
    assert torch.__version__.split("+")[0] in out
    assert "linear_logprob" in out


# Training


def test_train_hands_over_recipe_overrides_and_output(dph_command, monkeypatch, models, tmp_path):
    calls, result = [], [Result(None, None, tmp_path, 7, False, 0, {})]
    monkeypatch.setattr(
        "dph.train.entry.train", lambda recipe, resume, **_: calls.append((recipe, resume)) or result[0]
    )
    argv = ["train", "sft", "optimiser.steps=7", "--output", tmp_path / "a b: c", "optimiser.warmup=0", "--resume"]
    argv.append(f"model.path={models / 'judge'}")  # a missing model would be refused before training
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
