"""Training: one loop for all stages, from a recipe or from Python.

result = train(recipe.load("align"))                                   # from a recipe
result = train(settings, model=model, tokenizer=tokenizer, records=pairs)   # from Python, records in memory
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dph import devices, parallel, runs, start
from dph.data import Shuffled, encoder
from dph.errors import UserError
from dph.loop import Diverged, Result, Trainer
from dph.model import Model
from dph.pair_stage import PairStage
from dph.parallel import SINGLE, World
from dph.readers import Readers
from dph.recipe import Recipe
from dph.shared_run import SharedRun
from dph.stages import Stage
from dph.stream_stage import StreamStage

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
    """Train one stage; in processes that torchrun started, together (``dph.parallel``).

    Args:
        recipe: of the stage (``dph.recipe``).
        model: in memory, in place of ``recipe.model``; it is trained in place and turned into fp32.
        tokenizer: that goes with ``model``.
        records: in memory, in place of ``recipe.data.sources``: ``dph.data`` records, or what they encode to
            (``Encoded``; for preference stages a pair of them).
        held_out: the same for evaluation.
        resume: go on from the newest complete checkpoint in the recipe's directory, if there is one.
        quiet: no progress on the terminal.

    Raises UserError for whatever the recipe or the data have wrong, and :class:`Diverged`; of several processes, one
    raises it, and the others Elsewhere. Then a model in memory may be left as it was given.
    """
    if model is not None and tokenizer is None:
        raise UserError("tokenizer: expected the one that goes with the model, got None")
    with parallel.start(recipe.parallel, recipe.device) as world:
        run = open_run(recipe, world, resume)
        try:
            with world.together():
                if model is None:
                    model, tokenizer = start.open_start(recipe)
                stage = make_stage(recipe, model, tokenizer, records, held_out, world=world)
            if resume and run.checkpoint is None:
                stage.notes += (f"{run.directory} holds no checkpoint to resume, so the run begins",)
            with contextlib.closing(stage):
                return Trainer(recipe, stage, run, quiet or world.rank > 0).train()
        finally:
            run.close()


def open_run(recipe: Recipe, world: World, resume: bool) -> runs.Run | SharedRun:
    """The recipe's run directory, as a process of ``world`` sees it."""

    def opened() -> runs.Run:
        return runs.Run(recipe.output.directory, recipe.as_dict(), resume=resume, keep=recipe.output.keep)

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
    start.check_tokenizer(model, tokenizer)
    order = start.open_mixture(recipe) if records is None else Shuffled(records, recipe.seed)
    if recipe.data.workers:
        order = Readers(order, tokenizer, recipe.data.workers)
    if held_out is None:
        held_out = start.open_held_out(recipe)
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
