"""Start-up: CPU time of ``import dph`` and of a command's error, lazy names, import hooks, both orders of import."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import dph

ROOT = Path(__file__).resolve().parents[1]
HEAVY = "{'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)"


def python(*arguments, **environment):
    """The finished process of a fresh interpreter in the root of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def printed(code, *arguments, **environment):
    """What ``code`` prints in a fresh interpreter."""
    done = python("-c", code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cpu_seconds(*arguments):
    """User and system time of a fresh interpreter, the least of three: other processes disturb the others."""
    figures = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(figures)


def test_import_is_fast():
    assert cpu_seconds("-c", "import dph") <= 0.3


def test_the_error_of_a_missing_file_is_fast(tmp_path):
    argv = ("-m", "dph.cli", "score", "model", tmp_path / "nothing.jsonl")
    assert "nothing.jsonl: expected a JSONL file, got nothing there" in python(*argv).stderr
    assert cpu_seconds(*argv) <= 0.6


@pytest.mark.parametrize("first", ["", "dph.chat", "dph.errors", "dir(dph)", "dph.tasks.load('glue/sst2')"])
def test_what_needs_no_pytorch_imports_none(first):
    assert printed(f"import dph, sys; {first}\nprint({HEAVY})") == "set()"


def test_names_are_loaded_at_their_first_use():
    code = (
        "import dph, sys\n"
        "assert 'Model' in dir(dph) and 'Model' not in vars(dph) and 'dph.optim' not in sys.modules\n"
        "assert dph.LaProp is sys.modules['dph.optim'].LaProp is vars(dph)['LaProp']\n"
        "print([name for name in dph.__all__ if not hasattr(dph, name)], 'dph.train' in sys.modules)"
    )
    assert printed(code) == "[] False"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'dph' has no attribute 'Modle'"):
        dph.Modle  # noqa: B018


@pytest.fixture
def files(tmp_path):
    """Good input files, so that the checks of a command come to the bad one."""
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    (tmp_path / "glue" / "sst2" / "validation.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quickstart --output .", ".: exists already"),
        ("quickstart --scale nan", "--scale: expected a finite number above 0, got nan"),
        ("train nothing.yaml", "recipe: expected a file or one of"),
        ("train sft optimiser.steps=0", "optimiser.steps: expected 1 <= steps"),
        ("cache nothing.yaml", "recipe: expected a file or one of"),
        ("train mini-sft model.path=nowhere", "nowhere: expected the directory of a model"),
        ("train mini-pretrain model.tokenizer=nowhere", "nowhere: expected the directory of a tokenizer"),
        ("cache mini-head model.path=nowhere", "nowhere: expected the directory of a model"),
        (
            "train mini-pretrain model.tokenizer=. data.sources=[rows.jsonl,nothing.jsonl]",
            "data.sources.1: nothing.jsonl: expected a JSONL file, got nothing there",
        ),
        (
            "train mini-pretrain model.tokenizer=. data.sources=[rows.jsonl] evaluation.sources=[nothing.jsonl]",
            "evaluation.sources.0: nothing.jsonl: expected a JSONL file, got nothing there",
        ),
        ("evaluate nowhere --task glue/sst", "the nearest is 'glue/sst2'"),
        ("evaluate nowhere --task glue/cola --directory .", "expected a JSONL file, got nothing there"),
        ("evaluate nowhere --task glue/sst2 --directory .", "nowhere: expected the directory of a model"),
        ("generate nowhere --file nothing.jsonl", "nothing.jsonl: expected a JSONL file"),
        ("generate nowhere --prompt x", "nowhere: expected the directory of a model"),
        ("chat nowhere", "nowhere: expected the directory of a model"),
        ("score nowhere rows.jsonl", "nowhere: expected the directory of a model"),
        ("score nowhere rows.jsonl --output rows.jsonl", "--output: expected another file than the input rows.jsonl"),
        ("score nowhere rows.jsonl --output no/x.jsonl", "no/x.jsonl: No such file or directory"),
        ("convert own rows.jsonl/new --to own", "rows.jsonl: Not a directory"),
        ("train mini-sft model.path=own --output own", "output.directory: expected a directory that neither is nor"),
        ("train mini-sft model.path=own --output .", "output.directory: expected a directory that neither is nor"),
        ("train mini-pretrain model.tokenizer=own --output own", "nor contains that of model.tokenizer (own), got own"),
        ("train mini-pretrain model.tokenizer=own data.sources=[.] --output .", "that of model.tokenizer (own), got ."),
        (
            "train mini-pretrain model.tokenizer=own data.sources=[own] --output own/run",
            "outside of that of data.sources",
        ),
        ("train mini-pretrain model.tokenizer=. --output rows.jsonl/x", "rows.jsonl: Not a directory"),
        ("quickstart --output rows.jsonl/x", "rows.jsonl: Not a directory"),
        ("plot run nowhere -o x.png", "nowhere: expected a run, got nothing there"),
        ("plot landscape --epsilon 0.7 -o x.png", "expected 0 < epsilon < 0.5"),
        ("plot landscape -o no/x.png", "no/x.png: No such file or directory"),
        ("convert nowhere new --to own", "nowhere: expected the directory of a model"),
        ("convert owner/name . --to own", "expected a new or empty directory"),
        ("tokenizer rows.jsonl --output .", "expected a directory without a tokenizer"),
        ("tokenizer nothing.txt --output new", "nothing.txt: No such file or directory"),
        ("tokenizer nothing.jsonl --output new", "nothing.jsonl: expected a JSONL file, got nothing there"),
        ("tokenizer rows.jsonl --vocab-size 9 --output new", "vocab_size: expected at least"),
    ],
)
def test_wrong_input_is_refused_before_heavy_imports(words, message, files):
    code = (
        f"import os, sys; os.chdir({str(files)!r}); import dph.cli.main\n"
        f"code = dph.cli.main.main({words.split()})\n"
        f"print(code, {HEAVY} - {{'numpy'}})"  # the figures of `dph plot` need numpy
    )
    done = python("-c", code)
    assert message in done.stderr
    assert done.stdout == "2 set()\n"


AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification"
ORDERS = {
    "dph first": f"import dph\n{AUTO}",
    "transformers first": f"import transformers, dph\n{AUTO}",
    "Auto classes first": f"{AUTO}\nimport dph",
    "parts of transformers first": f"import dph\nfrom transformers import GenerationMixin, PreTrainedModel\n{AUTO}",
    "the model first": f"import dph.model.model\n{AUTO}",
}
OPEN = """
import copy, pickle, sys
from transformers import AutoTokenizer
path = sys.argv[1]
config = AutoConfig.from_pretrained(path)
for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
    assert type(same) is dph.ModelConfig and same.to_dict() == config.to_dict()
assert type(AutoModelForCausalLM.from_pretrained(path)) is dph.Model
assert type(AutoModelForCausalLM.from_config(config)) is dph.Model
assert isinstance(AutoModelForSequenceClassification.from_pretrained(path), dph.Model)
print(type(config).__name__, len(AutoTokenizer.from_pretrained(path)))
"""


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_open_a_directory_in_every_order_of_imports(order, models):
    size = len(pytest.importorskip("transformers").AutoTokenizer.from_pretrained(models / "judge"))
    assert printed(ORDERS[order] + OPEN, models / "judge") == f"ModelConfig {size}"


def test_released_configurations_are_read(shared):
    code = f"import dph, sys\n{AUTO}\nprint(AutoConfig.from_pretrained(sys.argv[1]).model_type)"
    assert printed(code, shared / "golden/checkpoint") == "dph"


@pytest.mark.parametrize(
    ("environment", "seen"),
    [({}, "20000"), ({"OMP_WAIT_POLICY": "passive"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_of_openmp_spin_a_bounded_time(environment, seen, tmp_path):
    show = "print(os.environ.get('GOMP_SPINCOUNT'))"
    (tmp_path / "torch.py").write_text(f"import os; {show}")
    code = f"import dph, os, sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; {show}"
    during, after = printed(code, **environment).split()
    assert (during, after) == (seen, environment.get("GOMP_SPINCOUNT", "None"))
