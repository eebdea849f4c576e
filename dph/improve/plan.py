"""Settings of the improvement loop, and the models that it opens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dph import devices
from dph.errors import UserError, shown
from dph.improve.prompts import Prompt, fingerprint
from dph.improve.selection import Selection
from dph.model.head_file import backbone_digest
from dph.model.judging import JudgingModel
from dph.model.loading import check_tokenizer, load_model, load_tokenizer
from dph.train.fingerprints import of_tokenizer
from dph.train.recipe import Recipe, from_dict
from dph.train.stages.labelled import require_separable

if TYPE_CHECKING:
    from dph.improve.checkers import Checker


@dataclass(frozen=True)
class Improvement:
    """Settings of all rounds.

    Attributes:
        model: directory or hub name of the first model.
        prompts: of the training records.
        held_out: prompts of the figures; none for no figures.
        checker: of the answers.
        judge: name of the checker, which the files depend on.
        judge_files: digests of its files by path, on whose contents they depend too (``checkers.content_of``).
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
    judge_files: Mapping[str, str] = field(default_factory=dict)
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
            "judge's files": dict(self.judge_files),
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
