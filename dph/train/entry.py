"""Training entry point: one function for all stages, from a recipe or from Python.

result = train(recipe.load("align"))                                   # from a recipe
result = train(settings, model=model, tokenizer=tokenizer, records=pairs)   # from Python, records in memory
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from dph._openmp import sleeping_when_contended
from dph.errors import UserError
from dph.model.model import Model
from dph.train import build, head_files
from dph.train.distributed import init_distributed
from dph.train.endings import Diverged, Result
from dph.train.head_states import prepare_heads
from dph.train.overview import describe_data
from dph.train.progress import harmless_output
from dph.train.recipe import Recipe, from_dict
from dph.train.run_dir import RunDirectory
from dph.train.trainer import Trainer

__all__ = ["Diverged", "Result", "Trainer", "train"]


def train(
    recipe: Recipe,
    *,
    model: Model | None = None,
    tokenizer: Any = None,
    records: Sequence[Any] | None = None,
    held_out: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    resume: bool = False,
    force_resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Train one stage; with torchrun, on all ranks together (``dph.train.distributed``).

    Args:
        recipe: the stage's recipe (``dph.train.recipe``).
        model: model in memory instead of ``recipe.model``; trained in place, and turned into fp32.
        tokenizer: the tokenizer of ``model``.
        records: records in memory instead of ``recipe.data.sources``: ``dph.data.dataset`` records, or encoded ones
            (``Encoded``; for preference stages a pair of them).
        held_out: the same for evaluation.
        resume: continue from the newest complete checkpoint in the recipe's directory, if there is one. Records,
            tokenizer and the model's configuration have to be those of the run (``dph.train.fingerprints``); the places
            that the recipe names may differ.
        force_resume: the same, with other records, another tokenizer or another configuration.
        quiet: no progress on the terminal.

    Nothing that is printed can fail, and neither TensorBoard nor a tracker ends a run. An error during training is
    raised after the state of the last whole step was saved, if that is possible: a note of the exception
    (``__notes__``) names the step.

    Raises UserError for errors in the recipe or the data, and :class:`Diverged`. With several ranks one of them raises
    the error, and the others OtherRankFailed; a model in memory may then be left as it was.
    """
    if model is not None and tokenizer is None:
        raise UserError("tokenizer: expected the one that goes with the model, got None")

    resume = resume or force_resume
    with sleeping_when_contended(), harmless_output(), init_distributed(recipe.parallel, recipe.device) as world:
        output = recipe.output
        run = RunDirectory(output.directory, recipe.as_dict(), resume=resume, keep=output.keep, world=world)
        redraws, recipe = recipe.data.redraw, from_dict(run.config)
        try:
            with world.fail_together():
                notes: tuple[str, ...] = ()
                if model is None and run.checkpoint is None:
                    model, tokenizer = build.open_model(recipe)
                elif model is None:
                    model, tokenizer, notes = build.reopen_model(recipe, run.directory / "start")
                stage = build.make_stage(recipe, model, tokenizer, records, held_out, world=world)
                stage.notes += notes
                if redraws and not recipe.data.redraw and recipe.kind == "preference":
                    stage.notes += ("data.redraw: false, since the run began before this option",)
                if run.checkpoint is None and recipe.kind == "preference":
                    prepare_heads(stage, quiet or world.rank > 0)
                overview: list[str] = []
                if run.checkpoint is None and world.rank == 0 and not quiet:
                    overview = describe_data(stage)
            if resume and run.checkpoint is None:
                stage.notes += (f"{run.directory} holds no checkpoint to resume, starting from the beginning",)
            stage.notes += tuple(overview)
            with contextlib.closing(stage):
                trainer = Trainer(recipe, stage, run, quiet or world.rank > 0, force_resume)
                result = trainer.train()
                if recipe.kind == "preference" and not result.interrupted:
                    head_files.write(stage, run, result, trainer.best)
                return result
        finally:
            run.close()
