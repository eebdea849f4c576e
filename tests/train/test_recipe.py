"""Recipes: the paper's stages as shipped, inheritance, overrides, and errors that name the key."""

import dataclasses
import json
import math
import typing

import pytest

from dph.cli import main
from dph.errors import UserError
from dph.model.config import POOLERS
from dph.train import recipe, run_dir


def write(path, text):
    path.write_text(text)
    return path


MINIMAL = """
stage: sft
model: {path: somewhere}
data: {sources: [corpus.jsonl, {source: "task:boolq", weight: 2}]}
optimiser: {lr: 3e-5, betas: [0.8, 0.9]}
"""


def test_paper_stages():
    """The paper's stages, cell by cell."""
    table = {  # lr, final_lr, warmup, steps, prior_decay, no_decay, size, micro divides
        "vocab": (6e-5, 0.0, 200, 4096, 0.0, None, 128),
        "sft": (3e-5, 0.0, 200, 6144, 0.5, ("embedding",), 128),
        "align": (3e-6, 3e-7, 200, 23040, 0.5, (), 64),
        "paper-head": (3e-6, 3e-7, 200, 7680, 0.5, (), 64),
    }
    for name, (lr, final, warmup, steps, prior, no_decay, size) in table.items():
        r = recipe.load(name)
        o = r.optimiser
        assert r.stage == name.removeprefix("paper-")
        assert (o.lr, o.final_lr, o.warmup, o.steps, o.prior_decay, o.clip) == (lr, final, warmup, steps, prior, 1.0)
        assert o.betas == (0.9, 0.95)
        assert o.eps == 1e-8
        assert no_decay is None or o.no_decay == no_decay
        assert r.batch.size == size
        assert (r.data.context, r.data.memory) == (2048, 2048)
    align, head = recipe.load("align").objective, recipe.load("paper-head").objective
    assert (align.beta, align.dpo_epsilon, align.dph_epsilon, align.dropout) == (0.6, 0.25, 0.1, 0.1)
    assert (align.dpo_weight, align.dph_weight) == (1.0, 1.0)
    assert head.dpo_weight == 0.0
    pretrain = recipe.load("pretrain")
    assert (pretrain.optimiser.lr, pretrain.optimiser.final_lr, pretrain.optimiser.warmup) == (6e-4, 6e-5, 2000)
    assert (pretrain.optimiser.weight_decay, pretrain.batch.size, pretrain.data.memory_kind) == (0.1, 480, "hidden")


@pytest.mark.parametrize("stage", ["pretrain", "vocab", "sft", "align", "paper-head"])
def test_the_paper_s_stages_come_out_even_among_processes(stage):
    """A share of every update for each of 1 to 32 processes, in parts that fill it."""
    batch = recipe.load(stage).batch
    for processes in (1, 2, 4, 8, 16, 32):
        share, rest = divmod(batch.size, processes)
        assert (rest, share % min(batch.micro or share, share)) == (0, 0), processes


def test_shipped_sources_exist():
    from dph import tasks

    for name in recipe.shipped():
        r = recipe.load(name)
        for source in (*r.data.sources, *r.evaluation.sources):
            task = tasks.load(source.source.removeprefix("task:"))
            assert r.kind != "preference" or task.paired
            assert "train" in task.splits or source in r.evaluation.sources


def test_values_and_defaults(tmp_path):
    r = recipe.load(write(tmp_path / "r.yaml", MINIMAL))
    assert r.optimiser.lr == 3e-5
    assert r.optimiser.betas == (0.8, 0.9)
    assert [(s.source, s.weight) for s in r.data.sources] == [("corpus.jsonl", 1.0), ("task:boolq", 2.0)]
    assert r.kind == "conversation"
    assert r.precision == "auto"


def test_as_dict_survives_json(tmp_path):
    r = recipe.load(write(tmp_path / "r.yaml", MINIMAL), ["model.config={hidden_size: 8, reward_heads: [a, b]}"])
    assert recipe.from_dict(json.loads(json.dumps(r.as_dict()))) == r


def test_bases_merge(tmp_path):
    write(tmp_path / "parent.yaml", MINIMAL)
    r = recipe.load(write(tmp_path / "child.yaml", "base: parent.yaml\noptimiser: {lr: 1.0}\n"))
    assert (r.optimiser.lr, r.optimiser.betas, r.model.path) == (1.0, (0.8, 0.9), "somewhere")
    r = recipe.load(write(tmp_path / "grandchild.yaml", "base: child.yaml\noptimiser: {eps: 2.0}\n"))
    assert (r.optimiser.lr, r.optimiser.eps, r.optimiser.betas) == (1.0, 2.0, (0.8, 0.9))


@pytest.mark.parametrize(("names", "said"), [("a", "a -> a"), ("ab", "a -> b -> a"), ("xab", "x -> a -> b -> a")])
def test_bases_that_go_round(names, said, tmp_path):
    for name, base in zip(names, names[1:] + names[-2:-1] if len(names) > 1 else names, strict=True):
        write(tmp_path / f"{name}.yaml", f"base: {base}.yaml\n")
    with pytest.raises(UserError, match="expected no circular base, got") as caught:
        recipe.load(tmp_path / f"{names[0]}.yaml")
    assert str(caught.value).endswith(" -> ".join(f"{name}.yaml" for name in said.split(" -> ")))


def test_overrides(tmp_path):
    path = write(tmp_path / "r.yaml", MINIMAL)
    overrides = [
        "optimiser.lr=1e-4",
        "data.sources.1.weight=3",
        "data.sources.0=other.jsonl",
        "batch.micro=4",
        "seed=7",
    ]
    r = recipe.load(path, [*overrides, "evaluation.sources=[held.jsonl]", "model.tokenizer=tok"])
    assert r.optimiser.lr == 1e-4
    assert [(s.source, s.weight) for s in r.data.sources] == [("other.jsonl", 1.0), ("task:boolq", 3.0)]
    assert (r.batch.micro, r.seed, r.model.tokenizer, r.evaluation.sources[0].source) == (4, 7, "tok", "held.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1", "optimizer: unknown key; did you mean optimiser?"),
        ("optimiser.learning=1", "optimiser.learning: unknown key; did you mean optimiser"),
        ("lr=1", "lr: unknown key; did you mean optimiser.lr?"),
        ("data.sources=[{sorce: x}]", "data.sources.0.sorce: unknown key; did you mean data.sources.source?"),
        ("qqqq=1", "qqqq: unknown key; known: stage, model"),
        ("optimiser.steps=1.5", "optimiser.steps: expected a whole number, got 1.5"),
        ("optimiser.steps=true", "optimiser.steps: expected a whole number, got True"),
        ("optimiser.lr=fast", "optimiser.lr: expected a number, got 'fast'"),
        ("optimiser.betas=[0.9]", "optimiser.betas: expected a list of 2 numbers, got [0.9]"),
        ("optimiser.no_decay=norm", "optimiser.no_decay: expected a list, such as [norm], got 'norm'"),
        ("stage=dance", "stage: expected one of pretrain, vocab, sft, align, head, got 'dance'"),
        ("data=5", "data: expected a section with keys, got 5"),
        ("data.sources=[{weight: 1}]", "data.sources.0.source: expected text, got nothing"),
        ("data.sources.9.weight=1", "data.sources.9.weight: expected a number below 2, got '9'"),
        ("data.sources.0.weight=1", "data.sources.0.weight: expected a section or a list at 0"),
        ("objective.dpo_epsilon=0.5", "objective.dpo_epsilon: expected 0 <= dpo_epsilon < 0.5, got 0.5"),
        ("optimiser.lr=.nan", "optimiser.lr: expected 0 <= lr < inf, got nan"),
        ("optimiser.warmup=9999", "optimiser.warmup: expected at most steps 6144, got 9999"),
        ("batch.tokens=512", "batch.tokens: expected none in stage sft, got 512"),
        ("batch.micro=7", "batch.micro: expected a divisor of batch.size 128, got 7"),
        ("optimiser.betas=[0.9, 1.0]", "optimiser.betas.1: expected 0 <= betas < 1, got 1.0"),
        ("optimiser.betas=[-0.1, 0.9]", "optimiser.betas.0: expected 0 <= betas < 1, got -0.1"),
        (
            "objective.pooler=swiglu",
            "objective.pooler: expected one of identity, bert, t5, swiglu_bert, swiglu_t5, got 'swiglu'",
        ),
        ("data.sources.1.weight=-1", "data.sources.1.weight: expected 0 <= weight < inf, got -1.0"),
        ("data.sources.1.limit=0", "data.sources.1.limit: expected 1 <= limit < inf, got 0"),
        (
            "evaluation.sources=[{source: x, limit: -3}]",
            "evaluation.sources.0.limit: expected 1 <= limit < inf, got -3",
        ),
        ("device=gpu", "device: expected auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ("optimiser.lr=[", "optimiser.lr: expected YAML"),
        ("optimiser.lr={a: 1, a: 2}", "optimiser.lr: the key 'a' is there twice"),
        ("optimiser.steps=1:30", "optimiser.steps: expected a whole number, got '1:30'"),
        ("optimiser.steps=0x10", "optimiser.steps: expected a whole number, got '0x10'"),
        ("compile=yes", "compile: expected true or false, got 'yes'"),
        (f"optimiser.lr=1{'0' * 350}", "optimiser.lr: expected a number below 1e308, got 1000"),
        ("seed=9223372036854775808", "seed: expected a whole number of at most 64 bits, got 9223372036854775808"),
        (f"output.directory=[{'[' * 40 + ']' * 40}]", "output.directory: expected text, got [[[[...]]]]"),
        (f"{'x' * 300}=1", "override: expected a key of at most 200 printable characters, got 'xxx"),
        ("a\nb=1", "override: expected a key of at most 200 printable characters, got 'a\\nb'"),
        ("data.sources.²=1", "data.sources.²: expected a number below 2, got '²'"),
        ('model={"a\\nb": 1}', "model.a\\nb: unknown key"),
        ("data.workers=1000000000", "data.workers: expected at most 256 (each is a process"),
        ("device=cuda:99999999999", "device: expected auto, cpu, cuda or cuda:NUMBER, got 'cuda:99999999999'"),
        ("optimiser.lr", "override: expected key.sub=value, got 'optimiser.lr'"),
    ],
)
def test_errors_name_the_key(tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        recipe.load(write(tmp_path / "r.yaml", MINIMAL), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_poolers_and_devices():
    """What the recipe admits is what the model has."""
    for pooler in (*POOLERS, None):
        assert recipe.from_dict({"stage": "align", "objective": {"pooler": pooler}}).objective.pooler == pooler
    for device in ("auto", "cpu", "cuda", "cuda:3"):
        assert recipe.from_dict({"stage": "align", "device": device}).device == device


def test_file_errors(tmp_path):
    with pytest.raises(UserError, match="expected a file or one of a100-align, a100-head"):
        recipe.load("nothing")
    with pytest.raises(UserError, match="expected keys and values, got list"):
        recipe.load(write(tmp_path / "list.yaml", "- 1\n"))
    with pytest.raises(UserError, match="expected YAML"):
        recipe.load(write(tmp_path / "broken.yaml", "stage: [\n"))
    with pytest.raises(UserError, match="stage: expected one of pretrain"):
        recipe.load(write(tmp_path / "empty.yaml", "seed: 1\n"))
    with pytest.raises(UserError, match=r"twice\.yaml:3: the key 'seed' is there twice, first in line 1"):
        recipe.load(write(tmp_path / "twice.yaml", "seed: 1\nstage: sft\nseed: 2\n"))
    with pytest.raises(UserError, match=r"base\.yaml: base: expected the name of a recipe, got \[1\]"):
        recipe.load(write(tmp_path / "base.yaml", "base: [1]\n"))
    for name in ("x" * 5000, "a\0b", tmp_path):
        with pytest.raises(UserError, match="recipe: expected a file or one of"):
            recipe.load(name)
    (tmp_path / "latin.yaml").write_bytes(b"stage: sft\nmodel: {path: caf\xe9}\n")
    with pytest.raises(UserError, match=r"latin\.yaml:2: not UTF-8 at byte 28"):
        recipe.load(tmp_path / "latin.yaml")
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbfstage: sft\r\nseed: 010\r\n")
    assert recipe.load(tmp_path / "windows.yaml").seed == 10
    for i in range(recipe.MAX_BASES + 2):
        write(tmp_path / f"{i}.yaml", f"base: {i + 1}.yaml\n")
    with pytest.raises(UserError, match="base: expected at most 32 recipes based on each other"):
        recipe.load(tmp_path / "0.yaml")


def test_words_that_yaml_1_1_took_for_booleans_are_names():
    r = recipe.load("align", ["objective.heads=[on, no, 2001-01-01]", "output.best=null", "seed=-007"])
    assert (r.objective.heads, r.seed) == (("on", "no", "2001-01-01"), -7)


def fields_of(cls):
    """Every field below a configuration class, by its dotted key."""
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        yield field.name, field
        if dataclasses.is_dataclass(item):
            yield from ((f"{field.name}.{name}", inner) for name, inner in fields_of(item))


FIELDS = dict(fields_of(recipe.Recipe))
OPTIONS = [key for key, field in FIELDS.items() if field.default_factory is dataclasses.MISSING]  # no sections


def test_every_key_is_documented():
    """By help in the field of the option itself; ``describe`` shows it."""
    assert len(FIELDS) > 60
    text = recipe.describe()
    for key, field in FIELDS.items():
        assert field.metadata["help"].strip(), key
        shown = key.replace("sources.", "sources.N.")
        assert f"\n{shown}:" in f"\n{text}", key


def test_the_command_prints_every_option(capsys):
    assert main.main(["train", "--options"]) == 0
    assert capsys.readouterr() == (f"{recipe.describe()}\n", "")


def test_help_is_in_one_place():
    """Docstrings describe sections; none repeats their keys."""
    kinds = {recipe.Recipe, recipe.Source, *typing.get_type_hints(recipe.Recipe).values()}
    for section in filter(dataclasses.is_dataclass, kinds):
        documented = {line.split(":")[0].strip() for line in section.__doc__.splitlines()}
        assert not documented & {field.name for field in dataclasses.fields(section)}, section.__name__


RANGES = {  # every option with a range: minimum, bound
    "data.sources.weight": (0, math.inf), "data.sources.limit": (1, math.inf), "data.consecutive": (1, math.inf),
    "data.context": (1, math.inf), "data.memory": (0, math.inf), "data.workers": (0, math.inf),
    "optimiser.lr": (0, math.inf), "optimiser.final_lr": (0, math.inf), "optimiser.warmup": (0, math.inf),
    "optimiser.steps": (1, math.inf), "optimiser.betas": (0, 1), "optimiser.eps": (0, math.inf),
    "optimiser.weight_decay": (0, math.inf), "optimiser.prior_decay": (0, math.inf),
    "optimiser.head_weight_decay": (0, math.inf), "optimiser.head_prior_decay": (0, math.inf),
    "optimiser.clip": (1e-12, math.inf), "batch.size": (1, math.inf), "batch.micro": (1, math.inf),
    "batch.tokens": (1, math.inf), "objective.beta": (0, math.inf), "objective.dpo_epsilon": (0, 0.5),
    "objective.dph_epsilon": (0, 0.5), "objective.dpo_weight": (0, math.inf), "objective.dph_weight": (0, math.inf),
    "objective.dropout": (0, 1), "guard.stop_after": (1, math.inf), "guard.spike": (1e-12, math.inf),
    "evaluation.sources.limit": (1, math.inf), "evaluation.sources.weight": (0, math.inf),
    "objective.sample": (10, math.inf), "objective.ensemble": (1, math.inf),
    "evaluation.share": (0, 1), "data.prefixes": (0, 1), "evaluation.patience": (1, math.inf),
    "evaluation.every": (0, math.inf), "output.save_every": (0, math.inf), "output.keep": (1, math.inf),
    "output.log_every": (1, math.inf), "train.last_layers": (1, math.inf), "lora.rank": (1, math.inf),
    "lora.alpha": (1e-12, math.inf), "lora.dropout": (0, 1),
}  # fmt: skip


def outside(key, value):
    """Values for ``from_dict`` with one option set."""
    values = {"stage": "align", "output": {}, "evaluation": {}, "data": {}}
    section = values
    for name in key.split(".")[:-1]:
        if name == "sources":
            section[name] = [{"source": "x"}]
            section = section[name][0]
        else:
            section = section.setdefault(name, {})
    section[key.split(".")[-1]] = value
    return values


@pytest.mark.parametrize("key", FIELDS)
def test_the_range_of_an_option_is_that_of_its_field(key):
    """A recipe refuses values below the minimum and at the bound of every field that has a range."""
    minimum, below = FIELDS[key].metadata.get("minimum"), FIELDS[key].metadata.get("below")
    assert (key in RANGES) == (minimum is not None)
    if key not in RANGES:
        return
    assert (minimum, below) == RANGES[key]
    name = key.split(".")[-1]
    values = [minimum - 1] if below == math.inf else [minimum - 1, below]
    for value in values:
        value = [value, 0.5] if name == "betas" else value
        with pytest.raises(UserError, match=rf"{name}(\.0)?: expected {minimum} <= {name} < {below}, got "):
            recipe.from_dict(outside(key, value))


MAXIMA = {
    "objective.sample": 2**20, "objective.ensemble": 64,
    "data.workers": 256, "data.context": 2**24, "data.memory": 2**24, "data.consecutive": 2**16,
    "optimiser.steps": 10**9, "batch.size": 2**20, "batch.tokens": 2**31 - 1,
    "train.last_layers": 1024, "lora.rank": 2**14,
}  # fmt: skip


@pytest.mark.parametrize("key", FIELDS)
def test_absurd_sizes_are_refused_with_the_reason(key):
    maximum, reason = FIELDS[key].metadata.get("maximum") or (None, None)
    assert maximum == MAXIMA.get(key)
    if maximum is None:
        return
    recipe.from_dict(outside(key, maximum))
    with pytest.raises(UserError, match=rf"{key}: expected at most {maximum} \({reason}\), got {maximum + 1}"):
        recipe.from_dict(outside(key, maximum + 1))
    assert f"at most {maximum}" in recipe.describe()


def test_options_that_may_change_on_resume_are_marked_in_their_fields():
    marked = {key for key, field in FIELDS.items() if field.metadata["resume"]}
    expected = {"output", "evaluation", "data.memory_place", "data.workers", "batch.micro", "parallel"}
    assert marked == recipe.MAY_CHANGE_ON_RESUME == expected | {"checkpointing", "compile", "cuda_graph"}


@pytest.mark.parametrize("key", OPTIONS)
def test_a_run_resumes_with_exactly_the_marked_options_changed(key, tmp_path, monkeypatch):
    """The run directory refuses another value of any option that is neither marked nor in a marked section."""
    monkeypatch.setattr(run_dir.trackers, "load_package", lambda *_: None)
    config = {"stage": "align", "data": {"sources": [{"source": "x"}]}, "evaluation": {"sources": [{"source": "x"}]}}
    before = recipe.from_dict(config).as_dict()
    run = run_dir.RunDirectory(tmp_path / "run", before)
    run.begin()
    run.log(1, {"loss": 1.0})
    run.close()
    after = json.loads(json.dumps(before))
    section, (*parents, name) = after, key.replace("sources.", "sources.0.").split(".")
    for parent in parents:
        section = section[int(parent) if parent.isdigit() else parent]
    section[name] = "another"
    may_change = any(key == marked or key.startswith(f"{marked}.") for marked in recipe.MAY_CHANGE_ON_RESUME)
    if may_change:
        assert run_dir.RunDirectory(tmp_path / "run", after, resume=True).step == 0
    else:
        with pytest.raises(UserError, match="a resumed run must not differ"):
            run_dir.RunDirectory(tmp_path / "run", after, resume=True)


def test_a_path_that_is_too_long_is_wrong_input(refused):
    """The operating system's error is of no class of its own."""
    for words in (("train", "sft", f"model.path={'x' * 300}"), ("convert", "x" * 300, "out", "--to", "own")):
        assert "File name too long" in refused(*words)
