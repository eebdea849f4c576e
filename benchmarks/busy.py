"""Training beside busy processes: time of a step of the quickstart's stages alone and beside N of them, in turns.

    python -m benchmarks.busy                                   # beside one busy process per core, and beside five
    python -m benchmarks.busy align --beside 2 --rounds 20

The busy processes (``while True: pass``) start once and are stopped while steps are timed alone, so that both figures
of a ratio come from the same minute. Each has a session of its own, as if another user had started it. Before every
turn, untimed steps let the trainer notice the change (``dph._openmp``). Goal: at most 3 times slower beside one busy
process per core.
"""

import argparse
import contextlib
import itertools
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dph import _openmp  # isort: skip  # before torch, as in the quickstart: bounds OpenMP's spinning
import torch

from benchmarks.train_step import Ours
from dph import chat
from dph.data import tokenizer
from dph.data.formats import Conversation, Encoder, Preference, Text
from dph.demo import puzzles, quickstart
from dph.evaluate.tables import table
from dph.train import build, recipe

STAGES = ("pretrain", "sft", "align", "head")
RECORDS = 1280  # of a stage; head has cached all of them after the first steps
SETTLE = _openmp.PAUSES[-1] + 0.5  # seconds of untimed steps after a change of the load
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n for _ in range(10**6): pass"


class Sample(NamedTuple):
    """Mean figures of the steps of one turn."""

    seconds: float
    cpu_seconds: float  # user and system time of all threads
    switches: float  # voluntary and involuntary context switches


def make_training(stage: str, folder: str) -> Ours:
    """Return a stage of the quickstart on an untrained model, by the stage's miniature recipe."""
    rng, texts, conversations, pairs = random.Random(0), [], [], []
    for puzzle in itertools.islice(puzzles.puzzles(0), RECORDS):
        answer = puzzles.corpus_answer(puzzle, rng)
        texts.append(Text(f"{puzzle.prompt}\n{answer}\n"))
        sides = []
        for text in (answer, puzzle.truth, puzzle.falsehood):
            sides.append([*puzzle.question(), chat.Message(role="assistant", content=text)])
        conversations.append(Conversation(sides[0]))
        pairs.append(Preference(sides[1], sides[2]))
    words = tokenizer.from_iterator([*(text.text for text in texts), *chat.ROLES * 9], quickstart.VOCABULARY)
    settings = recipe.load(f"mini-{stage}", [f"output.directory={folder}", "device=cpu"])
    torch.manual_seed(0)
    model = build.new_model(recipe.load("mini-pretrain").as_dict()["model"]["config"], words)
    records: list[Any] = {"text": texts, "conversation": conversations, "preference": pairs}[settings.kind]
    if settings.kind == "preference":
        model = build.with_heads(model, settings.objective)
        records = list(map(Encoder(words), records))  # as the quickstart gives them: tokens of its own samples
    return Ours(build.make_stage(settings, model, words, records, {}))


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Yield ``count`` busy processes, stopped."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(count)]
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(training: Ours, seconds: float) -> Sample:
    """Take steps for about this time, at least one, and return their mean figures."""
    before, began, count = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        training.step()
        count += 1
    elapsed, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    return Sample(elapsed / count, spent / count, switches / count)


def measure(training: Ours, loads: Sequence[int], rounds: int, seconds: float) -> dict[int, list[Sample]]:
    """Return the samples of each number of busy processes, which take turns in every round."""
    samples: dict[int, list[Sample]] = {load: [] for load in loads}
    with busy_processes(max(loads)) as processes, _openmp.sleeping_when_contended():
        for _ in range(rounds):
            for load in loads:
                for process in processes[:load]:
                    process.send_signal(signal.SIGCONT)
                steps(training, SETTLE)
                samples[load].append(steps(training, seconds))
                for process in processes[:load]:
                    process.send_signal(signal.SIGSTOP)
    return samples


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cores = len(os.sched_getaffinity(0))
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.busy",
        description="Time training steps of the quickstart's stages alone and beside busy processes, in turns.",
        epilog="example: python -m benchmarks.busy align --beside 2 5",
    )
    names = ", ".join(STAGES)
    result.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: {names}")
    loads = sorted({cores, 5})
    result.add_argument("--beside", nargs="+", type=int, default=loads, metavar="N", help=f"default: {loads}")
    result.add_argument("--rounds", type=int, default=3, help="turns of each load (default: 3)")
    result.add_argument("--seconds", type=float, default=3.0, help="of a turn (default: 3)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table and return the exit code."""
    options, rows = parser().parse_args(arguments), []
    if unknown := set(options.stages) - set(STAGES):
        parser().error(f"expected stages of {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    for stage in options.stages or STAGES:
        with tempfile.TemporaryDirectory() as folder:
            training = make_training(stage, f"{folder}/run")
            steps(training, 3.0)  # kernels are chosen, memories and caches filled
            samples = measure(training, [0, *options.beside], options.rounds, options.seconds)
        alone = statistics.median(sample.seconds for sample in samples[0])
        for load, of_load in samples.items():
            ratios = [sample.seconds / base.seconds for sample, base in zip(of_load, samples[0], strict=True)]
            figures = [statistics.median(column) for column in zip(*of_load, strict=True)]
            row = (stage, load, 1e3 * figures[0], 1e3 * figures[1], f"{figures[2]:.0f}", statistics.median(ratios))
            rows.append(row)
        print(f"{stage}: {1e3 * alone:.1f} ms a step alone", file=sys.stderr)
    print(f"{torch.get_num_threads()} threads, load average before {os.getloadavg()[0]:.1f}")
    print(table(("stage", "busy", "ms a step", "CPU ms", "switches", "times alone"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
