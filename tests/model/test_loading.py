"""Folders of models and tokenizers, broken in every way: one line with the file, and never weights that are made up."""

import builtins
import json
import logging
import shutil
import sys

import pytest
import torch
from helpers.command_line import ANSWER, ASKED, USER
from helpers.texts import write_lines
from helpers.tiny import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dph
from dph.errors import UserError
from dph.model import model as modeling
from dph.model.config import MAX_HEADS, POOLERS
from dph.model.generation_settings import read_generation_config
from dph.model.loading import check_settings, check_tokenizer, load_model, load_tokenizer

ENTRIES = {
    "load_model": lambda path: load_model(str(path)),
    "Model": dph.Model.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
}


@pytest.fixture(scope="module")
def released(models, tmp_path_factory):
    """A model in the released layout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    dph.Model.from_pretrained(models / "judge").save_official(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "judge" / name, folder)
    return folder


@pytest.fixture(params=["own", "released"])
def folder(request, models, released, tmp_path):
    """A copy of a model, in either layout."""
    source = models / "judge" if request.param == "own" else released
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture
def judge(models, tmp_path):
    """A copy of a model in the own layout."""
    return shutil.copytree(models / "judge", tmp_path / "copy")


def change_weights(folder, change):
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def named(weights, word):
    """Names of the weights that contain ``word``, those of the second block."""
    return [name for name in sorted(weights) if word in name and ".1." in name]


# Weights


def drop_block(weights):
    for name in named(weights, "blocks"):
        del weights[name]


def add_block(weights):
    for name in named(weights, "blocks"):
        weights[name.replace(".1.", ".2.")] = weights[name].clone()


def round_block(weights):
    for name in named(weights, "blocks"):
        weights[name] = weights[name].long()


def drop_all(weights):
    weights.clear()
    weights["x"] = torch.zeros(1)


def change_shape(weights):
    (name,) = named(weights, "fc2.weight")
    weights[name] = weights[name].T.contiguous()


FAULTS = {
    drop_block: r"got 1[26] missing \(the first is \S+blocks\.1\.att\S+\)$",
    add_block: r"got 1[26] not of this model \(the first is \S+blocks\.2\.att\S+\)$",
    round_block: r"got 1[26] of another type \(the first is \S+blocks\.1\.att\S+: I64\)$",
    drop_all: r"got 3[19] missing \(the first is \S+embedding.weight\), 1 not of this model \(the first is x\)$",
    change_shape: r"got 1 of another shape \(the first is \S+1.ffn.fc2.weight: \[48, 32\], expected \[32, 48\]\)$",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_are_never_made_up(fault, folder, caplog, capfd, monkeypatch):
    """One line from every entry, and no table of transformers."""
    handled = []
    for name in ("transformers.modeling_utils", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "handle", handled.append)
    change_weights(folder, fault)
    for load in ENTRIES.values():
        with pytest.raises(UserError, match=rf"^{folder}/model.safetensors: expected .* {FAULTS[fault]}"):
            load(folder)
    assert (handled, caplog.records, capfd.readouterr()) == ([], [], ("", ""))


@pytest.mark.parametrize(("layers", "text"), [(0, "2[4] not|32 not"), (1, "1[26] not"), (3, "1[26] missing")])
def test_another_number_of_layers(layers, text, folder):
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", **{"n_layers" if "n_layers" in config else "num_hidden_layers": layers})
    with pytest.raises(UserError, match=text):
        dph.Model.from_pretrained(folder)


def test_every_command_refuses_a_missing_weight_and_writes_nothing(judge, dph_command, tmp_path):
    change_weights(judge, lambda weights: weights.pop("backbone.input_proj.weight"))
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]})
    for argv in (
        ["score", judge, rows],
        ["score", judge, rows, "--logprob-only"],
        ["generate", judge, *ASKED],
        ["chat", judge],
        ["convert", judge, tmp_path / "converted", "--to", "own"],
        ["convert", judge, tmp_path / "converted", "--to", "official"],
        ["train", "sft", f"model.path={judge}", f"data.sources=[{rows}]", "evaluation.sources=[]", "--output",
         tmp_path / "run"],
    ):  # fmt: skip
        code, out, err = dph_command(*argv)
        assert (code, out) == (2, ""), argv
        assert "1 missing (the first is backbone.input_proj.weight)" in err
        assert len(err.splitlines()) == 1
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["copy"]
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_weights_load(dtype, judge):
    before = dph.Model.from_pretrained(judge)
    change_weights(judge, lambda weights: weights.update({name: t.to(dtype) for name, t in weights.items()}))
    after = dph.Model.from_pretrained(judge, dtype=torch.float32)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a.to(dtype).float(), b), name


def test_infinite_weights_load_as_they_are(judge):
    infinite = torch.full((32, 16), float("inf"))
    change_weights(judge, lambda weights: weights.update({"backbone.input_proj.weight": infinite}))
    assert torch.equal(dph.Model.from_pretrained(judge).backbone.input_proj.weight, infinite)


def test_several_files_are_one_model(folder):
    """The same weights from an index and two files, in either layout."""
    before = dph.Model.from_pretrained(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number in range(2):
        part = {name: weights[name].clone() for name in sorted(weights)[number::2]}
        save_file(part, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    after = dph.Model.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_heads_that_the_configuration_lacks_are_announced(judge, caplog):
    change_json(judge / "config.json", reward_heads=["default"])
    with caplog.at_level(logging.WARNING, "dph.model.model"):
        model = dph.Model.from_pretrained(judge)
    assert model.head_names == ["default"]
    assert "1 weights of reward heads that are not in the configuration are left out" in caplog.text
    assert "heads.shared.reward.short.weight" in caplog.text


def test_only_heads_may_have_other_sizes_on_request(judge):
    file = judge / "model.safetensors"
    weights = load_file(file)
    name = "heads.shared.reward.short.weight"
    save_file(weights | {name: torch.zeros(1, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"got 1 of another shape"):
        dph.Model.from_pretrained(judge)
    assert dph.Model.from_pretrained(judge, ignore_mismatched_sizes=True).untrained_heads == {"short"}
    other = "backbone.embedding.weight"
    save_file(weights | {other: weights[other][:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"got 1 of another shape \(the first is backbone.embedding"):
        dph.Model.from_pretrained(judge, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("layers", [0, 3])
def test_expected_weights_are_those_of_a_model(pooler, layers):
    config = tiny_config(reward_pooler=pooler, num_hidden_layers=layers, task_heads=("a", "b"))
    weights, expected = dict(dph.Model(config).named_parameters()), dph.Model.expected_weights(config)
    assert {name: t.shape for name, t in expected.items()} == {name: t.shape for name, t in weights.items()}
    matrices = sum(t.numel() for name, t in weights.items() if t.dim() == 2 and ".reward." not in name)
    assert config.least_parameters == matrices


# Sizes, types and names in config.json


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_hidden_layers", "2", "a whole number, got '2'"),
        ("num_hidden_layers", 2.5, "a whole number, got 2.5"),
        ("num_hidden_layers", True, "a whole number, got True"),
        ("num_hidden_layers", None, "a whole number, got None"),
        ("hidden_size", [32], r"a whole number, got \[32\]"),
        ("num_hidden_layers", -1, "at least 0, got -1"),
        ("num_hidden_layers", 100_000, "at most 1024 .*, got 100000"),
        ("vocab_size", 10**4000, r"at most 16777216 .*, got 1000+\.\.\.0+"),
        ("vocab_size", 0, "at least 1, got 0"),
        ("rope_base", "5e5", "a finite number, got '5e5'"),
        ("rope_base", float("inf"), "a finite number, got inf"),
        ("layer_norm_eps", -1e-5, "a number of at least 0, got -1e-05"),
        ("reward_dropout", None, "a finite number, got None"),
        ("rope_reversed", "no", "true or false, got 'no'"),
        ("tie_word_embeddings", 1, "true or false, got 1"),
        ("eos_token_id", [0, "3"], "a whole number, got '3'"),
        ("pad_token_id", -1, "at least 0, got -1"),
        ("im_end_token_id", 280, "below vocab_size 280, got 280"),
        ("released", [1], r"an object, got \[1\]"),
        ("dtype", "load", "one of float64, .*, got 'load'"),
        ("dtype", "int8", "one of float64, .*, got 'int8'"),
        ("id2label", 5, "a setting of transformers' type, got 5"),
        ("compile_config", [1], r"a setting that transformers can use, got \[1\]"),
        ("'to_dict'", 5, "the name of a setting, got that of a method or property"),
        ("'block_weights'", 5, "the name of a setting, got that of a method or property"),
        ("transformers_weights", "pytorch_model.bin", "none .*, got 'pytorch_model.bin'"),
        ("quantization_config", {"quant_method": "fp8"}, "none .*"),
        ("configuration_files", ["config.1.0.0.json"], "none, got .*"),
        ("_attn_implementation", 5, "the name of an implementation, got 5"),
    ],
)
def test_a_fault_in_the_configuration_names_file_and_key(key, value, expected, judge):
    change_json(judge / "config.json", **{key.strip("'"): value})
    with pytest.raises(UserError, match=rf"^{judge}/config.json: {key}: expected {expected}") as error:
        load_model(str(judge))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name", ["type", "values", "keys", "forward", "training", "a.b", "", "x" * 101, "a\x1b[31m", "a\n", "\ud800", 5]
)
def test_names_that_no_head_can_have(name, judge):
    for heads in ({"reward_heads": [name]}, {"task_heads": ["good", name]}):
        with pytest.raises(UserError, match=r"reward_heads, task_heads: expected .* got ."):
            tiny_config(**heads)
    change_json(judge / "config.json", reward_heads=[name])
    with pytest.raises(UserError, match=rf"^{judge}/config.json: reward_heads, task_heads: expected") as error:
        load_model(str(judge))
    assert str(error.value).isprintable()


def test_heads_have_any_other_name_and_a_bounded_number():
    model = tiny_model(reward_heads=["glue/sst2", "my head", "日本", "x" * 100], task_heads=["0", "typed"])
    assert model.head_names == ["glue/sst2", "my head", "日本", "x" * 100, "0", "typed"]
    with pytest.raises(UserError, match=f"reward_heads, task_heads: expected at most {MAX_HEADS} names, got 100000"):
        tiny_config(task_heads=[f"h{i}" for i in range(99_999)])
    with pytest.raises(UserError, match="reward_heads: expected a sequence of names, got 'default'"):
        tiny_config(reward_heads="default")


def test_an_argument_is_checked_as_the_file_is(judge):
    for entry in (dph.Model.from_pretrained, dph.ModelConfig.from_pretrained):
        with pytest.raises(UserError, match="num_hidden_layers: expected a whole number, got '2'"):
            entry(judge, num_hidden_layers="2")


def test_a_model_that_does_not_fit_is_refused_before_memory_is_allocated():
    config = dph.ModelConfig(hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=1024, num_attention_heads=64)
    with pytest.raises(UserError, match=r"model: expected weights that fit into the .* GB of memory .*, 1971975.1 GB"):
        dph.Model(config)
    with torch.device("meta"):
        assert (
            dph.Model(dph.ModelConfig(hidden_size=2**17, num_hidden_layers=1, num_attention_heads=64)).num_parameters()
            > 2**36
        )


def test_a_broken_generation_config_is_not_replaced_in_silence(judge):
    file = judge / "generation_config.json"
    for content, text in (
        ("{", ":1: expected JSON"),
        ("[1]", r": expected a JSON object, got \[1\]"),
        ('{"eos_token_id": ["x"]}', ": eos_token_id: expected a whole number, got 'x'"),
        ('{"temperature": "hot"}', ": temperature: expected a number, got 'hot'"),
        ('{"watermarking_config": 5}', ": expected settings of generation, got: "),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=f"^{file}{text}"):
            dph.Model.from_pretrained(judge)
    file.unlink()
    assert dph.Model.from_pretrained(judge).generation_config.eos_token_id == 0


# Folders that ask to run their Python


def test_code_of_a_folder_is_never_run_or_asked_for(folder, monkeypatch, tmp_path):
    def asked(*_):
        raise AssertionError("a question at the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", open("/dev/zero"))  # noqa: SIM115 - a terminal stands there
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    originals = {name: (folder / name).read_text() for name in ("config.json", "tokenizer_config.json")}
    for name, calls in {
        "config.json": [*ENTRIES.values(), load_tokenizer],
        "tokenizer_config.json": [load_tokenizer, check_settings],
    }.items():
        change_json(folder / name, auto_map=names)
        for call in calls:
            with pytest.raises(UserError, match=rf"^{folder}/{name}: auto_map: expected no code or kernel to load"):
                call(str(folder))
        (folder / name).write_text(originals[name])
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.P"}}))
    with pytest.raises(UserError, match=r"preprocessor_config.json: auto_map: expected no code"):
        load_tokenizer(str(folder))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('code of the folder ran')\n")
    dph.Model.from_pretrained(folder, trust_remote_code=True).generate(torch.tensor([[5]]), max_new_tokens=1)
    assert not (tmp_path / "ran").exists()


def test_other_formats_are_not_read_on_request(judge):
    for options in ({"use_safetensors": False}, {"gguf_file": "model.gguf"}):
        with pytest.raises(UserError, match="use_safetensors, gguf_file: expected True and None"):
            dph.Model.from_pretrained(judge, **options)


# Tokenizers


def change_tokenizer(change):
    def apply(folder):
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return apply


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:900])


UNREADABLE = "tokenizer.json: expected a tokenizer, got a file that cannot be read: "
BROKEN_TOKENIZERS = {
    "truncated": (truncate, f"{UNREADABLE}EOF while parsing"),
    "empty": (with_file("tokenizer.json", b""), UNREADABLE),
    "list": (with_file("tokenizer.json", b"[]"), UNREADABLE),
    "bytes": (with_file("tokenizer.json", b"\xff"), UNREADABLE),
    "vocab": (change_tokenizer(lambda d: d["model"].update(vocab=None)), UNREADABLE),
    "id": (change_tokenizer(lambda d: d["model"]["vocab"].update(z="a")), UNREADABLE),
    "added": (change_tokenizer(lambda d: d.pop("added_tokens")), "tokenizer.json: added_tokens: expected a list"),
    "gone": (lambda folder: (folder / "tokenizer.json").unlink(), "expected the vocabulary of a tokenizer, such as"),
    "settings": (with_file("tokenizer_config.json", b"{"), "tokenizer_config.json:1: expected JSON"),
    "eos": (with_file("tokenizer_config.json", b'{"eos_token": 5}'), "tokenizer_config.json: eos_token: expected text"),
    "class": (with_file("tokenizer_config.json", b'{"tokenizer_class": 5}'), "tokenizer_config.json: expected sett"),
    "length": (
        with_file("tokenizer_config.json", b'{"model_max_length": -1}'),
        "tokenizer_config.json: model_max_length: ex",
    ),
    "legacy": (with_file("added_tokens.json", b'{"x": "y"}'), "added_tokens.json: 'x': expected the token's id, got"),
    "map": (with_file("special_tokens_map.json", b"[5]"), "special_tokens_map.json: expected a JSON object, got ."),
    "config": (with_file("config.json", b'{"dtype": "float7"}'), "config.json: expected settings of a model, got:"),
    "own": (
        with_file("config.json", b'{"model_type": "dph", "vocab_size": "9"}'),
        "config.json: vocab_size: expected a",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_TOKENIZERS)
def test_broken_tokenizers_name_the_file(kind, judge):
    change, text = BROKEN_TOKENIZERS[kind]
    change(judge)
    with pytest.raises(UserError, match=f"^{judge}[/:] ?{text}") as error:
        load_tokenizer(str(judge))
    assert len(str(error.value).splitlines()) == 1


def test_a_token_beyond_the_vocabulary_is_named(judge):
    """As many tokens as the model has rows, one of them with a larger id."""

    def move(document):
        vocabulary = document["model"]["vocab"]
        vocabulary[list(vocabulary)[20]] = 9999

    change_tokenizer(move)(judge)
    with pytest.raises(UserError, match=r"tokenizer: expected ids below 280, got 9999 for '.*'"):
        check_tokenizer(load_model(str(judge)), load_tokenizer(str(judge)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_every_settings_file_of_a_hub_name_is_looked_through(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": "code.Tokenizer"}}', encoding="utf-8")

    def cached_file(path, file, **_):
        assert path == "owner/model"
        return str(tmp_path / file) if (tmp_path / file).exists() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    with pytest.raises(UserError, match="auto_map: expected no code or kernel to load"):
        check_settings("owner/model")


def test_generation_settings_of_a_hub_name_are_looked_through(tmp_path, monkeypatch):
    file = tmp_path / "generation_config.json"
    file.write_text('{"custom_generate": "owner/code"}', encoding="utf-8")
    monkeypatch.setattr("transformers.utils.cached_file", lambda path, name, **_: str(file))
    with pytest.raises(UserError, match="custom_generate: expected no code or kernel to load"):
        read_generation_config("owner/model", {})


def test_a_model_without_memory_may_be_larger_than_the_host(monkeypatch):
    """As accelerate's ``init_empty_weights`` makes it: its parameters are on the meta device one by one."""
    monkeypatch.setattr(modeling, "host_memory", lambda: 1)
    with pytest.raises(UserError, match="expected weights that fit into"):
        dph.Model(tiny_config())
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(torch.nn.Module, "register_parameter", on_meta)
    assert all(p.is_meta for p in dph.Model(tiny_config()).parameters())


def test_the_check_of_memory_draws_no_random_number():
    state = torch.get_rng_state()
    modeling._check_host_memory(tiny_config())
    assert torch.equal(torch.get_rng_state(), state)
