"""Training: one loop for all stages, from a recipe or from Python.

result = train(recipe.load("align"))                                   # from a recipe
result = train(settings, model=model, tokenizer=tokenizer, records=pairs)   # from Python, records in memory
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dph import devices
from dph.data.dataset import Shuffled, encoder
from dph.data.workers import Readers
from dph.errors import UserError
from dph.model.model import Model
from dph.train import build, distributed, run_dir
from dph.train.checkpointing import SharedRun
from dph.train.distributed import SINGLE, World
from dph.train.recipe import Recipe
from dph.train.stages.base import Stage
from dph.train.stages.lm import StreamStage
from dph.train.stages.preference import PairStage
from dph.train.trainer import Diverged, Result, Trainer

__all__ = ["Diverged", "Result", "Trainer", "make_stage", "open_run", "train"]


def train(
    recipe: Recipe,
    *,
    model: Model | None = None,
    tokenizer: Any = None,
    records: Sequence[Any] | None = None,
    held_out: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Train one stage; in processes that torchrun started, together (``dph.train.distributed``).

    Args:
        recipe: of the stage (``dph.train.recipe``).
        model: in memory, in place of ``recipe.model``; it is trained in place and turned into fp32.
        tokenizer: that goes with ``model``.
        records: in memory, in place of ``recipe.data.sources``: ``dph.data.dataset`` records, or what they encode to
            (``Encoded``; for preference stages a pair of them).
        held_out: the same for evaluation.
        resume: go on from the newest complete checkpoint in the recipe's directory, if there is one.
        quiet: no progress on the terminal.

    Raises UserError for whatever the recipe or the data have wrong, and :class:`Diverged`; of several processes, one
    raises it, and the others Elsewhere. Then a model in memory may be left as it was given.
    """
    if model is not None and tokenizer is None:
        raise UserError("tokenizer: expected the one that goes with the model, got None")
    with distributed.start(recipe.parallel, recipe.device) as world:
        run = open_run(recipe, world, resume)
        try:
            with world.together():
                if model is None:
                    model, tokenizer = build.open_start(recipe)
                stage = make_stage(recipe, model, tokenizer, records, held_out, world=world)
            if resume and run.checkpoint is None:
                stage.notes += (f"{run.directory} holds no checkpoint to resume, so the run begins",)
            with contextlib.closing(stage):
                return Trainer(recipe, stage, run, quiet or world.rank > 0).train()
        finally:
            run.close()


def open_run(recipe: Recipe, world: World, resume: bool) -> run_dir.Run | SharedRun:
    """The recipe's run directory, as a process of ``world`` sees it."""

    def opened() -> run_dir.Run:
        return run_dir.Run(recipe.output.directory, recipe.as_dict(), resume=resume, keep=recipe.output.keep)

    return opened() if world.size == 1 else SharedRun(world, opened)


def make_stage(
    recipe: Recipe,
    model: Model,
    tokenizer: Any,
    records: Any,
    held_out: Any,
    device: torch.device | None = None,
    world: World = SINGLE,
) -> Stage:
    """The stage of ``recipe`` over records in memory, or over the recipe's sources; on its device or on another.

    A model that several processes are to share stays on the CPU.
    """
    build.check_tokenizer(model, tokenizer)
    order = build.open_mixture(recipe) if records is None else Shuffled(records, recipe.seed)
    if recipe.data.workers:
        order = Readers(order, tokenizer, recipe.data.workers)
    if held_out is None:
        held_out = build.open_held_out(recipe)
    elif not isinstance(held_out, Mapping):
        held_out = {"held out": held_out}
    if device is None:
        device = devices.choose(recipe.device if world.size == 1 else "cpu")
    return (PairStage if recipe.kind == "preference" else StreamStage)(
        recipe=recipe,
        model=model.to(device=device, dtype=torch.float32),
        tokenizer=tokenizer,
        encode=encoder(tokenizer),
        records=order,
        held_out={name: found for name, found in held_out.items() if len(found)},
        world=world,
    )
