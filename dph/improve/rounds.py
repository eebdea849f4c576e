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
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dph import chat, devices
from dph.data import atomic
from dph.data.json_lines import read_jsonl
from dph.data.sampler import draw
from dph.errors import UserError, add_note, shown
from dph.improve.figures import figures, share_right
from dph.improve.prompts import Prompt, fingerprint, grow
from dph.improve.selection import Selection
from dph.infer.best_of_n import check_number, prompt_tokens, sample
from dph.infer.sampling import Sampling
from dph.model.head_file import backbone_digest
from dph.model.judging import JudgingModel
from dph.model.loading import check_tokenizer, load_model, load_tokenizer
from dph.train.endings import Result
from dph.train.fingerprints import of_tokenizer
from dph.train.recipe import Recipe, from_dict
from dph.train.stages.labelled import require_separable

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


@dataclass(frozen=True)
class Improvement:
    """Settings of all rounds.

    Attributes:
        model: directory or hub name of the first model.
        prompts: of the training records.
        held_out: prompts of the figures; none for no figures.
        checker: of the answers.
        judge: name of the checker, which the files depend on.
        recipe: of stage head or align; its model, sources and directory are those of a round.
        directory: of all rounds.
        n: answers per prompt of the first round, the second, ...; the last number is that of all later ones.
        held_out_n: answers per held-out prompt.
        selection: of the training records.
        sampling: fields of ``dph.infer.sampling.Sampling``.
        normalise: what makes two answers the same in a vote.
        seed: of the answers.
        device, dtype: that answers are computed with.
        note: called with a line of text about what begins.
        progress: called with a name, the number of prompts that are done, and that of all.

    Raises UserError for a recipe that cannot learn from the records.
    """

    model: str
    prompts: Sequence[Prompt]
    checker: Checker
    judge: str
    recipe: Recipe
    directory: Path
    n: tuple[int, ...] = (16,)
    held_out: Sequence[Prompt] = ()
    held_out_n: int = 16
    selection: Selection = field(default_factory=Selection)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    normalise: Callable[[str], str] = str.strip
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda name, done, total: None

    def __post_init__(self) -> None:
        """Check the recipe."""
        recipe, objective = self.recipe, self.recipe.objective
        if recipe.kind != "preference" or not objective.dph_weight:
            raise UserError(
                f"recipe: expected stage head or align with objective.dph_weight above 0, got {recipe.stage}"
            )
        if self.selection.form == "labels":
            require_separable(recipe, "labelled alone, as form labels makes them")
        if len(objective.heads) != 1:
            raise UserError(f"objective.heads: expected one head, got {', '.join(objective.heads) or 'none'}")
        for key, value in (("data.sources", recipe.data.sources), ("evaluation.sources", recipe.evaluation.sources)):
            if value:
                raise UserError(f"{key}: expected none, as records are made from --prompts, got {shown(value)}")
        if recipe.output.best is not None and not recipe.evaluation.share:
            raise UserError(
                f"evaluation.share: expected a share above 0, as output.best is {recipe.output.best}, got 0; "
                "output.best=null output.model=last needs none"
            )
        overlap = {prompt.key for prompt in self.prompts}.intersection(prompt.key for prompt in self.held_out)
        if overlap:
            raise UserError(
                f"held-out prompts: expected other prompts than those of training, got {len(overlap)} of them"
            )

    @property
    def head(self) -> str:
        """Name of the head."""
        return self.recipe.objective.heads[0]

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.directory / f"round{number}"

    def records(self, number: int) -> Path:
        """Return the file of a round's records."""
        return self.folder(number) / f"{self.selection.form}.jsonl"

    def recipe_of(self, number: int) -> Recipe:
        """Return the recipe of a round: from the first model, on the records of all rounds up to this one."""
        values = self.recipe.as_dict()
        values["model"]["path"] = self.model
        sources = [{"source": str(self.records(i)), "weight": "size"} for i in range(1, number + 1)]
        values["data"]["sources"] = sources
        values["data"]["cache"] = self.recipe.data.cache or str(self.directory / "cache")
        values["output"]["directory"] = str(self.folder(number) / "run")
        return from_dict(values)

    def open(self, number: int) -> tuple[JudgingModel, Any]:
        """Return the model after a round, in evaluation mode, and its tokenizer; 0 is the first model."""
        return open_model(self.model if number == 0 else str(self.folder(number) / "run"), self.device, self.dtype)

    def about(self, model: JudgingModel, tokenizer: Any) -> dict[str, Any]:
        """Return what the files depend on, as JSON; the number of rounds may grow. The model is the first one."""
        about = {
            "model": backbone_digest(model),
            "tokenizer": of_tokenizer(tokenizer),
            "prompts": fingerprint(self.prompts),
            "held_out": fingerprint(self.held_out),
            "held_out_n": self.held_out_n,
            "judge": self.judge,
            "n": self.n,
            "selection": dataclasses.asdict(self.selection),
            "sampling": dict(self.sampling),
            "seed": self.seed,
            "device": model.device.type,
            "dtype": str(model.dtype),
            "recipe": self.recipe.as_dict(),
        }
        return json.loads(json.dumps(about))


def open_model(path: str, device: str, dtype: str) -> tuple[JudgingModel, Any]:
    """Return a model, in evaluation mode on ``--device`` in ``--dtype``, and its tokenizer."""
    device = devices.choose(device, "--device")
    model = load_model(path, dtype=getattr(torch, devices.inference_dtype(dtype, device)))
    tokenizer = load_tokenizer(path)
    check_tokenizer(model, tokenizer)
    return model.to(device).eval(), tokenizer


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
    if different := [key for key in about if saved.get(key) != about[key]]:
        raise UserError(
            f"{plan.directory}: expected the command that began there, got another {', '.join(different)}: give "
            "another --output"
        )
