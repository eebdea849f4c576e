"""Hostile files: records, documents of tasks, recipes, configurations, tokenizers, weights, all changed at random.

    python tests/helpers/fuzz.py --cases 200000                 # all targets
    python tests/helpers/fuzz.py --cases 5000 --targets recipes --seed 3

Every case must end, within five seconds of processor time, in a result or in an error that the command line prints as
one line that names the file. Prints a table of the cases by target and exits with 1 at the first that ends otherwise;
hypothesis shows the smallest case of its kind.
"""

import argparse
import contextlib
import copy
import json
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import yaml
from helpers.command_line import save_models
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dph import chat, tasks
from dph.cli.main import explain
from dph.data import dataset
from dph.data.formats import EXPECTED_FIELDS, Encoder
from dph.errors import UserError, printable
from dph.model.loading import check_tokenizer, load_model, load_tokenizer
from dph.train import recipe

SECONDS, LONGEST = 5, 60  # of processor time, and by the clock
CHATS = [{"role": "user", "content": "a film?"}, {"role": "assistant", "content": "is gripping"}]


# Changes of JSON values and of bytes

# Texts that stand for JSON that json.dumps does not write.
RAW = {
    '"@digits"': "9" * 5000, '"@deep list"': "[" * 100_000 + "]" * 100_000, '"@infinity"': "1e999",
    '"@deep object"': '{"a":' * 5000 + "1" + "}" * 5000, '"@half"': '"\\ud83d"', '"@zeros"': "-0.0e-999",
}  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 2**31, 2**63, 10**10, 10**30]), st.floats(),
    st.text(max_size=20), st.sampled_from([name[1:-1] for name in RAW]),
    st.sampled_from(["\x1b[31m", "\0", "<|im_end|>", "type", "float32", "auto", "{text}", "{0.__class__}", "BC"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(value, place=()):
    """Paths of all values in nested lists and objects."""
    found = [place] if place else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*place, key))
    return found


@st.composite
def changed(draw, document):
    """``document`` with up to three values replaced, wrapped, deleted or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        found = places(document)
        if not found:
            return draw(VALUES)
        *path, last = draw(st.sampled_from(found))
        parent = document
        for key in path:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "wrap", "delete", "add", "clear"]))
        if change == "replace":
            parent[last] = draw(VALUES)
        elif change == "wrap":
            parent[last] = [parent[last]]
        elif change == "clear":
            parent[last] = type(parent[last])()
        elif change == "delete":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=12))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
    return document


def json_text(document):
    """JSON of a document, with the stand-ins of ``RAW`` replaced."""
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return text


@st.composite
def damaged(draw, content):
    """``content``, bytes, cut off or with some bytes replaced, added or repeated."""
    place = draw(st.integers(0, len(content)))
    change = draw(st.sampled_from(["cut", "replace", "insert", "repeat"]))
    if change == "cut":
        return content[:place]
    if change == "repeat":
        return content[:place] + content[max(0, place - draw(st.integers(1, 80))) :]
    special = st.sampled_from([b"\xef\xbb\xbf", b"\0", b"\xff", b"\n", b"}", b'"'])
    junk = draw(st.binary(min_size=1, max_size=4) | special)
    return content[:place] + junk + content[place + (len(junk) if change == "replace" else 0) :]


@st.composite
def changed_bytes(draw, document):
    """JSON of a document that was changed; one in four is damaged as well."""
    content = json_text(draw(changed(document))).encode(errors="surrogatepass")
    return draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


# Targets: a strategy of cases, and what is done with a case in a folder


class Target:
    """One kind of file; ``folder`` holds the models of ``save_models``."""

    def __init__(self, folder):
        self.folder, self.cases = folder, self.strategy()
        self.encode = Encoder(load_tokenizer(folder / "judge"))

    def strategy(self):
        """The cases."""
        raise NotImplementedError

    def use(self, case):
        """Read the case to the end; returns the name that an error has to hold."""
        raise NotImplementedError


class Records(Target):
    """JSONL files of each kind of record."""

    DOCUMENTS = (
        {"text": "a text"}, {"messages": CHATS}, {"prompt": "a film?", "completion": "is gripping", "label": True},
        {"prompt": CHATS[:1], "chosen": CHATS[1:], "rejected": [{"role": "assistant", "content": "is not"}]},
        {"chosen": CHATS, "rejected": [CHATS[0], {"role": "assistant", "content": "is not"}]},
    )  # fmt: skip

    def strategy(self):
        document = st.sampled_from(self.DOCUMENTS)
        return st.tuples(st.sampled_from(sorted(EXPECTED_FIELDS)), document.flatmap(changed_bytes))

    def use(self, case):
        kind, line = case
        path = self.folder / "records.jsonl"
        first = json_text(self.DOCUMENTS[3] if kind == "preference" else {"messages": CHATS})
        path.write_bytes(first.encode() + b"\n" + line)
        yield path.name
        for record in dataset.load(path, kind):
            self.encode(record)


class Documents(Target):
    """Documents of every task."""

    def strategy(self):
        name = st.sampled_from(sorted(tasks.names()))
        return name.flatmap(
            lambda name: st.tuples(st.just(name), changed_bytes(json.loads(json.dumps(tasks.load(name).example))))
        )

    def use(self, case):
        name, line = case
        task = tasks.load(name)
        split = next(iter(task.splits))
        path = self.folder / "tasks" / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(line)
        yield path.name
        for kind in ("conversation", "preference") if task.paired else ("conversation",):
            for record in dataset.load(f"task:{name}", kind, split=split, directory=self.folder / "tasks"):
                if record is not None:
                    self.encode(record)


class Recipes(Target):
    """YAML recipes and overrides on the command line."""

    LINES = (
        "batch: {size: 3}", "a: &a [1]", "b: [*a, *a]", "? [x]", "data: !!python/object:os.system {}", "\tseed: 1",
        "---", "<<: {seed: 1}", "seed: 010", "seed: 1:30", "on: 1", "x: &x [*x]", "seed: 2001-01-01", "stage: sft",
    )  # fmt: skip
    KEYS = ("batch.size", "optimiser.lr", "data.sources", "objective.heads", "model.config", "data", "seed", "x.y", "")

    def strategy(self):
        document = recipe.load("align", []).as_dict()
        yaml_text = st.one_of(
            changed_bytes(document),
            changed(document).map(lambda changed: yaml.safe_dump(changed).encode(errors="surrogatepass")),
            damaged(yaml.safe_dump(document).encode()),
            st.lists(st.sampled_from(self.LINES), max_size=4).map("\n".join).map(str.encode),
        )
        word = st.tuples(st.sampled_from(self.KEYS), st.text(max_size=12) | VALUES.map(str)).map("=".join)
        return st.tuples(yaml_text, st.lists(word, max_size=2))

    def use(self, case):
        content, words = case
        path = self.folder / "recipe.yaml"
        path.write_bytes(content)
        yield ""  # of an override the key is named, of a value its dotted key
        recipe.load(str(path), words)


class ModelFolder(Target):
    """A file of a saved model; the others are whole."""

    name = ""

    def __init__(self, folder):
        self.path = folder / "judge" / self.name
        self.whole = self.path.read_bytes()
        super().__init__(folder)

    def strategy(self):
        return changed_bytes(json.loads(self.whole))

    def use(self, case):
        try:
            self.path.write_bytes(case)
            yield "judge"
            model, tokenizer = load_model(str(self.folder / "judge")), load_tokenizer(str(self.folder / "judge"))
            check_tokenizer(model, tokenizer)
            encoded = chat.encode(CHATS, tokenizer)
            with torch.no_grad():
                model(torch.tensor([encoded.tokens]))
            tokenizer.decode(encoded.tokens)
        finally:
            self.path.write_bytes(self.whole)


class Configurations(ModelFolder):
    """config.json of a model."""

    name = "config.json"


class Tokenizers(ModelFolder):
    """tokenizer.json."""

    name = "tokenizer.json"


class TokenizerConfigurations(ModelFolder):
    """tokenizer_config.json."""

    name = "tokenizer_config.json"


class Weights(ModelFolder):
    """model.safetensors: header and length."""

    name = "model.safetensors"

    def strategy(self):
        (length,) = struct.unpack("<Q", self.whole[:8])
        header, data = json.loads(self.whole[8 : 8 + length]), self.whole[8 + length :]
        lengths = st.none() | st.sampled_from([0, 1, length - 1, length + 8, 2**40, 2**63])

        @st.composite
        def case(draw):
            content, said = draw(changed_bytes(header)), draw(lengths)
            data_part = data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data
            return struct.pack("<Q", len(content) if said is None else said) + content + data_part

        return case()


TARGETS = {
    "records": Records, "documents": Documents, "recipes": Recipes, "configurations": Configurations,
    "tokenizers": Tokenizers, "tokenizer configurations": TokenizerConfigurations, "weights": Weights,
}  # fmt: skip


# Runs


class Hang(BaseException):
    """A case did not end."""


def ring(*_):
    raise Hang(f"a case did not end within {LONGEST} s")


def outcome(target, case):
    """Run one case: "result" or "refused"; anything else raises."""
    steps = target.use(case)
    name = next(steps)
    try:
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        with contextlib.suppress(StopIteration):
            next(steps)
        return "result"
    except UserError as error:
        line = explain(error)
        assert printable(line, keep="") == line, f"control characters in {line!r}"
        assert name in line, f"no {name} in {line!r}"
        assert len(line) < 1000, f"{len(line)} characters: {line[:200]!r}"
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        steps.close()


def run(name, folder, cases, seed_number=0):
    """Run ``cases`` cases of a target from the models in ``folder``; how many gave a result, and how many an error."""
    target, counts, slowest = TARGETS[name](folder), Counter(), 0.0
    options = settings(
        max_examples=cases, database=None, deadline=None, derandomize=False, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def check(case):
        nonlocal slowest
        began = time.process_time()
        counts[outcome(target, case)] += 1
        seconds = time.process_time() - began
        assert seconds < SECONDS, f"{seconds:.1f} s"
        slowest = max(slowest, seconds)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options(seed(seed_number)(given(target.cases)(check)))()
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200_000, help="in all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'target':26}{'cases':>9}{'result':>9}{'refused':>9}{'slowest':>11}{'all':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.targets:
            began = time.monotonic()
            models = save_models(Path(folder) / name)
            counts, slowest = run(name, models, options.cases // len(options.targets), options.seed)
            row = f"{name:26}{counts.total():9,}{counts['result']:9,}{counts['refused']:9,}{slowest:9.2f} s"
            print(f"{row}{time.monotonic() - began:7.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
