"""Ends training at random moments in seven ways, resumes it each time, and compares it with an undisturbed run.

    python tests/helpers/killed.py FOLDER                              # all stages, 100 endings each
    python tests/helpers/killed.py FOLDER --stages sft --endings 20

After each ending the newest checkpoint must hold what that ending promises: every logged step, where the run was told
to end or found an error, and all but the last SAVE_EVERY where it could not write any more. Exits with 0 if that holds
and every weight is, bit for bit, that of the undisturbed run.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from dph.cli import main as command_line
from dph.data import tokenizer
from dph.demo import puzzles
from dph.train import checkpointing, entry  # noqa: F401  imported once, before the processes are forked

SAVE_EVERY = 7
STAGES = ("pretrain", "vocab", "sft", "align", "head")
MODEL = "{embedding_size: 32, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2}"
BEFORE = {"vocab": "pretrain", "sft": "vocab", "align": "sft", "head": "sft"}  # the stage whose model is trained
LONGEST = 120  # seconds that a run may take to end


def material(folder):
    """Texts, conversations, preferences and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), {"text": [], "messages": [], "pairs": []}
    for puzzle in itertools.islice(puzzles.puzzles(0), 1000):
        question, answer = puzzle.question(), puzzles.corpus_answer(puzzle, rng)
        rows["text"].append({"text": f"{puzzle.prompt}: {answer}"})
        rows["messages"].append({"messages": [*question, {"role": "assistant", "content": answer}]})
        rows["pairs"].append({"prompt": question, "chosen": puzzle.truth, "rejected": puzzle.falsehood})
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    texts = (puzzle.prompt for puzzle in itertools.islice(puzzles.puzzles(1), 500))
    tokenizer.from_iterator(texts, 300).save_pretrained(folder / "tokenizer")


@dataclass
class Runs:
    """The runs of one stage in a folder, with ``steps`` steps each."""

    folder: Path
    stage: str
    steps: int
    lost: dict[str, list[int]] = field(default_factory=dict)  # steps lost, by way of ending
    begun: tuple[int | None, int] = None, 0  # metrics file and checkpoint that the running process has found

    @property
    def data(self):
        """The stage's data file."""
        kinds = {"pretrain": "text", "align": "pairs", "head": "pairs"}
        return self.folder / f"{kinds.get(self.stage, 'messages')}.jsonl"

    def directory(self, name):
        """The directory of the run ``name``."""
        return self.folder / f"{self.stage}-{name}"

    def start(self, name):
        """Fork a process that trains as ``dph train --resume`` does; its id and the end of its stderr to read from."""
        model = f"model={{config: {MODEL}, tokenizer: {self.folder / 'tokenizer'}}}"
        if self.stage in BEFORE:
            model = f"model.path={self.folder / (BEFORE[self.stage] + '-whole') / 'model'}"
        words = [
            "train", f"mini-{self.stage}", "--resume", f"--output={self.directory(name)}", model,
            f"data.sources=[{self.data}]", f"data.cache={self.folder / 'cache'}", "batch.size=4",
            f"optimiser.steps={self.steps}", f"output.save_every={SAVE_EVERY}", "output.log_every=1", "device=cpu",
        ]  # fmt: skip
        reader, writer = os.pipe()
        sys.stdout.flush()
        process = os.fork()
        if process:
            os.close(writer)
            return process, reader
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        torch.set_num_threads(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not ignored, as under nohup
        os._exit(command_line.main(words))

    def whole(self):
        """Train undisturbed."""
        process, reader = self.start("whole")
        lines = read_all(reader)
        assert wait(process) == 0, lines

    def logged(self):
        """The last step that the run holds or has logged; 0 before the first."""
        file, saved = self.begun
        if self.metrics_file() == file:  # the process is starting: these lines are those of the one before
            return saved
        with contextlib.suppress(FileNotFoundError):
            whole = (self.directory("ended") / "metrics.jsonl").read_text().split("\n")[:-1]
            return max((json.loads(line)["step"] for line in whole), default=0)
        return 0

    def metrics_file(self):
        """Identity of the metrics file, which a run replaces when it begins."""
        path = self.directory("ended") / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def saved(self, name="ended"):
        """The step of the newest complete checkpoint; 0 without any."""
        newest = checkpointing.newest_checkpoint(self.directory(name) / "checkpoints")
        return 0 if newest is None else newest.step

    def end(self, way, target, rng):
        """Start the run, end it in a way at a random moment after step ``target``, and check what was saved.

        Returns whether the ending met a running process.
        """
        self.begun = self.metrics_file(), self.saved()
        process, reader = self.start("ended")
        while running(process) and self.logged() < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        met = running(process)
        code, logged, output = way.end(self, process, reader)
        lost = logged - self.saved()
        self.lost.setdefault(way.name, []).append(lost)
        allowed = SAVE_EVERY if way.loses_interval else 0
        assert lost <= allowed, f"{self.stage}, {way.name}: {lost} steps are lost, exit code {code}: {output[-600:]}"
        assert met is False or code in {0, *way.codes}, f"{self.stage}, {way.name}: exit code {code}: {output[-600:]}"
        assert "Traceback" not in output, f"{self.stage}, {way.name}: {output}"
        if code in (1, 2):
            (*_, last) = output.strip().splitlines()
            assert last.startswith("dph: error: "), f"{self.stage}, {way.name}: {output[-600:]}"
        return met

    def same(self):
        """Whether both runs have the same weights and logged the same number of lines."""
        names = [self.directory(name) for name in ("whole", "ended")]
        whole, parts = (load_file(name / "model" / "model.safetensors") for name in names)
        lines = [len((name / "metrics.jsonl").read_text().splitlines()) for name in names]
        equal = whole.keys() == parts.keys() and all(torch.equal(t, parts[name]) for name, t in whole.items())
        return equal and lines[0] == lines[1]


def running(process):
    """Whether a child process has not ended."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait(process):
    """The exit code of a child process, negative for a signal; a child that does not end is killed."""
    end = time.monotonic() + LONGEST
    while running(process):
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"the run did not end within {LONGEST} s")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read_all(reader):
    """All that a process wrote until it ended."""
    with os.fdopen(reader, errors="replace") as file:
        return file.read()


class Killed:
    """SIGKILL: no code of the run is executed any more."""

    name, codes, loses_interval = "SIGKILL", (-signal.SIGKILL,), True

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        os.kill(process, signal.SIGKILL)
        return wait(process), runs.logged(), read_all(reader)


class Signalled:
    """A signal that asks the run to end; before the first step it may end the process as it does any other."""

    loses_interval = False

    def __init__(self, number):
        self.number, self.name = number, signal.Signals(number).name
        self.codes = (-number, 128 + number)

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        logged = runs.logged()
        os.kill(process, self.number)
        return wait(process), logged, read_all(reader)


class PipeClosed(Signalled):
    """The reader of the output ends (``2>&1 | head``): the run has to go on, until SIGTERM."""

    def __init__(self):
        super().__init__(signal.SIGTERM)
        self.name = "broken pipe"

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        os.close(reader)
        target, end = runs.logged() + 2, time.monotonic() + LONGEST
        while running(process) and runs.logged() < target:
            assert time.monotonic() < end, "the run does not go on"
            time.sleep(0.002)
        logged = runs.logged()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        return wait(process), logged, ""


class DiskFull:
    """No file can grow any more."""

    name, codes, loses_interval = "disk full", (1,), True

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        output = read_all(reader)
        return wait(process), runs.logged(), output


class DataTruncated:
    """The data file loses its second half while it is read; it is whole again when the run is resumed."""

    name, codes, loses_interval = "data truncated", (2,), False

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        content, logged = runs.data.read_bytes(), runs.logged()
        with runs.data.open("r+b") as file:
            file.truncate(len(content) // 2)
        try:
            output = read_all(reader)
            return wait(process), logged, output
        finally:
            runs.data.write_bytes(content)


class FolderDeleted:
    """The run directory is deleted; its copy of that moment is put back for the resume."""

    name, codes, loses_interval = "folder deleted", (1, 2), True

    def end(self, runs, process, reader):
        """End the run; its exit code, the last step logged before that, and its output."""
        directory, copy = runs.directory("ended"), runs.folder / "copy"
        os.kill(process, signal.SIGSTOP)
        shutil.rmtree(copy, ignore_errors=True)
        if directory.exists():
            shutil.copytree(directory, copy)
            aside = directory.with_name("aside")  # a rename takes no time, in which the run could write
            directory.rename(aside)
            shutil.rmtree(aside)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
        output = read_all(reader)
        code = wait(process)
        shutil.rmtree(directory, ignore_errors=True)
        if copy.exists():
            copy.rename(directory)
        return code, runs.logged(), output


WAYS = (
    Killed(), Signalled(signal.SIGTERM), Signalled(signal.SIGHUP), PipeClosed(), DiskFull(), DataTruncated(),
    FolderDeleted(),
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--endings", type=int, default=100, help="of each stage's run")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    material(options.folder)
    rng, ways, different = random.Random(options.seed), itertools.cycle(WAYS), []
    for stage in STAGES:
        runs = Runs(options.folder, stage, options.steps)
        runs.whole()
        if stage not in options.stages:
            continue
        met, stretch = 0, options.steps / (options.endings + 1)
        for number in range(options.endings):
            met += runs.end(next(ways), int(stretch * (number + rng.random())), rng)
        process, reader = runs.start("ended")
        output = read_all(reader)
        assert wait(process) == 0, output
        same = runs.same()
        if not same:
            different.append(stage)
        worst = ", ".join(f"{name} {max(lost)}" for name, lost in runs.lost.items())
        result = "same weights" if same else "OTHER WEIGHTS"
        print(
            f"{stage}: {met} of {options.endings} endings met the run; {result}; most steps lost: {worst}", flush=True
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
