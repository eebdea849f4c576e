"""Rounds of improvement: sample answers, check them, train a head on those that mislead the present one, and again.

    DIR/improve.json             what the files depend on: another command is refused
    DIR/round0/held-out.jsonl    answers of the model itself to the held-out prompts
    DIR/roundK/samples.jsonl     answers of the model of round K - 1 to the prompts
    DIR/roundK/pairs.jsonl       records made from them, the hard ones first; or labels.jsonl
    DIR/roundK/run/              run directory: trained from the first model on the records of all rounds so far
    DIR/roundK/held-out.jsonl    answers of its model to the held-out prompts
    DIR/roundK/metrics.json      figures of the round; the round is complete

A line of samples has ``prompt`` (messages), and by answer ``candidates`` (texts), ``correct`` (0 to 1, by the checker;
0 for an answer that was cut off), ``finished``, ``tokens``, ``logprobs``, and ``rewards`` (null without a head, and for
a cut-off answer): a row of candidates for ``dph evaluate --candidates`` and ``dph card``.

The same command continues one that was stopped. Files of answers grow by whole batches, and training stops with a
checkpoint. A process that was killed (SIGKILL) repeats its batch, or the steps since the last checkpoint
(``output.save_every``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph import chat
from dph.data import atomic
from dph.data.json_lines import read_jsonl
from dph.data.sampler import draw
from dph.errors import UserError, add_note
from dph.improve.figures import figures, share_right
from dph.improve.plan import Improvement
from dph.improve.prompts import Prompt, grow
from dph.infer.best_of_n import check_number, prompt_tokens, sample
from dph.infer.sampling import Sampling
from dph.model.judging import JudgingModel
from dph.model.loading import load_tokenizer
from dph.train.endings import Result
from dph.train.recipe import Recipe, from_dict

if TYPE_CHECKING:
    from dph.improve.checkers import Checker

BATCH = 1 << 16  # tokens of answers, at most, that are sampled between two writes to a file


@dataclass(frozen=True)
class Sampler:
    """A model's answers to prompts, n each, judged.

    Attributes:
        model: in evaluation mode.
        tokenizer: of the model.
        checker: of the answers.
        head: reward head; without weights for it, rewards are null.
        n: answers per prompt.
        seed: of the answers.
        options: fields of ``dph.infer.sampling.Sampling``.
    """

    model: JudgingModel
    tokenizer: Any
    checker: Checker
    head: str
    n: int
    seed: int
    options: Mapping[str, Any]

    def __call__(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return the line of each prompt."""
        has_head = self.head in self.model.head_names and self.head not in self.model.untrained_heads
        tokens = [chat.prompt(prompt.messages, self.tokenizer) for prompt in prompts]
        groups = sample(self.model, self.tokenizer, tokens, self.n, seed=self.seed, rewards=has_head, **self.options)
        lines = []
        for prompt, answers in zip(prompts, groups, strict=True):
            texts, rewards, finished = [], [], []
            for answer in answers:
                _check_number(prompt, answer.logprob, "log-probability", answer.index)
                if self.head in answer.rewards:
                    _check_number(prompt, answer.rewards[self.head], "reward", answer.index)
                content = answer.tokens[: len(answer.tokens) - answer.finished]
                texts.append(self.tokenizer.decode(content, skip_special_tokens=False))
                rewards.append(answer.rewards.get(self.head))
                finished.append(answer.finished)
            different = list(dict.fromkeys(text for text, ended in zip(texts, finished, strict=True) if ended))
            values = dict(zip(different, self.checker(prompt, different), strict=True)) if different else {}
            correct = [values[text] if ended else 0.0 for text, ended in zip(texts, finished, strict=True)]
            lines.append(
                {
                    "prompt": prompt.messages,
                    "candidates": texts,
                    "correct": correct,
                    "finished": finished,
                    "tokens": [list(answer.tokens) for answer in answers],
                    "logprobs": [answer.logprob for answer in answers],
                    "rewards": rewards,
                }
            )
        return lines

    def rejudged(self, prompts: Sequence[Prompt], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return lines of the same backbone, with the rewards of this model's head."""
        groups = []
        for prompt, line in zip(prompts, lines, strict=True):
            tokens = chat.prompt(prompt.messages, self.tokenizer)
            groups.append([chat.continuation(tokens, answer, self.tokenizer) for answer in line["tokens"]])
        judged = []
        for prompt, line, one in zip(prompts, lines, self.model.judge(groups, logprobs=False), strict=True):
            rewards: list[float | None] = []
            for index, (reward, ended) in enumerate(zip(one.rewards[self.head], line["finished"], strict=True)):
                if ended:
                    _check_number(prompt, reward, "reward", index)
                rewards.append(reward if ended else None)
            judged.append({**line, "rewards": rewards})
        return judged


def _check_number(prompt: Prompt, value: float, kind: str, index: int) -> None:
    """Raise ValueError, with a note that names the prompt, for NaN."""
    try:
        check_number(value, kind, index)
    except ValueError as error:
        add_note(error, f"answering {prompt.place}")
        raise


def improve(plan: Improvement, rounds: int, train: Callable[[Recipe], Result]) -> Iterator[dict[str, Any]]:
    """Yield the figures of the first model, then of each round, as it is completed.

    Args:
        plan: of the rounds.
        rounds: number of them.
        train: trains a recipe, or continues its run, and returns the result (``dph.train.entry.train``).

    Raises UserError if the directory holds the rounds of another command, or is in use by another process, for a prompt
    that the model cannot answer, and SystemExit with an exit code if a signal ended training.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    with _locked(plan.directory):
        model, tokenizer = plan.open(0)
        longest = Sampling(**plan.sampling).max_new_tokens
        for prompt in (*plan.prompts, *plan.held_out):
            prompt_tokens(model, tokenizer, prompt.messages, longest, prompt.place)
        _check_same(plan, plan.about(model, tokenizer))
        del model
        for number in range(rounds + 1):
            yield _round(plan, number, train)


def _round(plan: Improvement, number: int, train: Callable[[Recipe], Result]) -> dict[str, Any]:
    """Complete a round unless it is complete; return its figures. Round 0 judges the first model."""
    folder = plan.folder(number)
    path = folder / "metrics.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    metrics: dict[str, Any] = {"round": number}
    if number:
        metrics |= _make_records(plan, number)
        plan.note(f"round {number}: training")
        with _noted(plan):
            result = train(plan.recipe_of(number))
        if result.interrupted:  # a checkpoint is written: the next call continues from it
            raise SystemExit(result.exit_code)
    lines: list[dict[str, Any]] = []
    if plan.held_out:
        name = f"round {number}: held-out prompts"
        file, first = folder / "held-out.jsonl", plan.folder(0) / "held-out.jsonl"
        before = first if number and plan.recipe.stage == "head" else None  # a frozen model gives the same answers
        lines = _sampled(plan, number, file, plan.held_out, plan.held_out_n, plan.seed, name, before)
        metrics["figures"] = figures(lines, plan.normalise)
    metrics["held_out"] = len(lines)
    atomic.write_text(path, json.dumps(metrics, indent=1) + "\n")
    return metrics


def _make_records(plan: Improvement, number: int) -> dict[str, Any]:
    """Sample answers with the model of the round before, and write the records; return their figures."""
    n = plan.n[min(number, len(plan.n)) - 1]
    seed = draw(2**62, plan.seed, "round", number)
    path, records = plan.folder(number) / "samples.jsonl", plan.records(number)
    lines = _sampled(plan, number - 1, path, plan.prompts, n, seed, f"round {number}: prompts")
    rows, refused = plan.selection.rows(lines, load_tokenizer(plan.model))
    atomic.write_text(records, "".join(json.dumps(row) + "\n" for row in rows))
    cut_off = 1 - sum(map(sum, (line["finished"] for line in lines))) / (n * len(lines))
    if not rows:
        earlier = sum(plan.records(i).stat().st_size for i in range(1, number))
        if not earlier:
            raise UserError(
                f"{path}: expected right and wrong answers to some prompt, got none among {len(lines)} prompts with "
                f"{n} answers each, {100 * cut_off:.0f} % of them cut off by --max-new-tokens: other prompts, more or "
                "longer answers may have both"
            )
    return {
        "prompts": len(lines), "n": n, "right": share_right(lines), "cut_off": cut_off, "records": len(rows),
        "refused": refused,
    }  # fmt: skip


def _sampled(
    plan: Improvement,
    number: int,
    path: Path,
    prompts: Sequence[Prompt],
    n: int,
    seed: int,
    name: str,
    before: Path | None = None,
) -> list[dict[str, Any]]:
    """Return the lines of a file of samples by the model after round ``number``, which is read only if some miss.

    With ``before`` only the rewards are its own: the answers are those of that file.
    """

    @cache
    def sampler() -> Sampler:
        model, tokenizer = plan.open(number)
        return Sampler(model, tokenizer, plan.checker, plan.head, n, seed, plan.sampling)

    tokens = n * Sampling(**plan.sampling).max_new_tokens
    answered = None if before is None else dict(zip(map(id, prompts), read_jsonl(before), strict=True))

    def make(batch: Sequence[Prompt]) -> list[dict[str, Any]]:
        if answered is None:
            return sampler()(batch)
        return sampler().rejudged(batch, [answered[id(prompt)] for prompt in batch])

    with _noted(plan):
        return grow(path, prompts, max(BATCH // tokens, 1), make, lambda done: plan.progress(name, done, len(prompts)))


@contextlib.contextmanager
def _noted(plan: Improvement) -> Iterator[None]:
    """Context in which errors and interrupts get a note that nothing complete is lost."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        add_note(error, f"the same command continues what is in {plan.directory}")
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Context in which no other process works in the directory."""
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is working there") from None
        except OSError:  # some file systems have no locks
            pass
        yield


def _check_same(plan: Improvement, about: dict[str, Any]) -> None:
    """Compare what the files depend on with what began in the directory, or write it."""
    path = plan.directory / "improve.json"
    if not path.is_file():
        if foreign := [name.name for name in plan.directory.iterdir() if name.name not in ("lock", "cache")]:
            raise UserError(f"{plan.directory}: expected a new folder, got one with {', '.join(sorted(foreign)[:5])}")
        atomic.write_text(path, json.dumps(about, indent=1) + "\n")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["recipe"] = from_dict(saved["recipe"]).as_dict()  # with the options of later versions
    about["recipe"] = from_dict(about["recipe"]).as_dict()
    saved.setdefault("judge's files", about["judge's files"])  # which earlier versions did not keep
    if different := [key for key in about if saved.get(key) != about[key]]:
        raise UserError(
            f"{plan.directory}: expected the command that began there, got another {', '.join(different)}: give "
            "another --output"
        )
