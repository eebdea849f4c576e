"""State of a run in its checkpoints: what is saved, what a resumed run accepts, and what it loads.

A resume compares the fingerprints first, since other data, another tokenizer or another model explain all else that
does not fit. A state file made by hand is an error that names the key, not a wrong run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dph._weights import check_tensors
from dph.errors import UserError
from dph.losses import IGNORED
from dph.train import checkpointing
from dph.train.checkpointing import Checkpoint, Section
from dph.train.distributed import shard_like

if TYPE_CHECKING:
    from dph.train.stages.base import Stage
    from dph.train.trainer import Trainer

log = logging.getLogger(__name__)

LARGEST = 2**62  # of a count: no run takes as many records or tokens


def count(value: Any) -> bool:
    """Whether the value is a whole number from 0."""
    return type(value) is int and 0 <= value < LARGEST


def number(value: Any) -> bool:
    """Whether the value is a number, of any kind."""
    return type(value) in (int, float)


def amount(value: Any) -> bool:
    """Whether the value is a finite number from 0."""
    return number(value) and 0 <= value < math.inf


def _list_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _numbers_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(number, value.values()))


def _best(value: Any) -> bool:
    if value is None:
        return True
    known = isinstance(value, dict) and value.keys() >= {"step", "figure", "value"}
    return known and count(value["step"]) and isinstance(value["figure"], str) and number(value["value"])


def _fingerprints(value: Any) -> bool:
    parts = {"sources": list, "sizes": list, "tokenizer": str, "model": str, "held_out": dict, "evaluation": list}
    known = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in parts.items())
    return known and _list_of(count, len(value["sources"]))(value["sizes"])


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(section, dict) for section in value)


def _counts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(count, value.values()))


def _guard(value: Any) -> bool:
    return _list_of(number, 4)(value) and amount(value[0]) and amount(value[3])


# Checks


def accept(checkpoint: Checkpoint, stage: Stage, now: Mapping[str, Any], force: bool) -> Section:
    """Return the state of the checkpoint that a run resumes from; a note of the stage names what has changed.

    Args:
        checkpoint: newest one of the run.
        stage: of the run that resumes.
        now: its fingerprints.
        force: accept other records, another tokenizer and another configuration.

    Raises UserError if something has changed and ``force`` is off, and if the state is not one of this run.
    """
    state, directory, recipe = checkpoint.state(), checkpoint.path.parent.parent, stage.recipe
    different = []
    if "fingerprints" in state:  # not in the checkpoints of earlier versions
        expected = "digests of sources, tokenizer, model and held-out records"
        saved = state.require("fingerprints", _fingerprints, expected)
        sources = [source.source for source in recipe.data.sources]
        names = [f"data.sources.{index} ({source})" for index, source in enumerate(sources)] or ["records"]
        different = _changes(saved, now, names)
        if len(saved["sources"]) != len(now["sources"]):  # positions in the one have no meaning in the other
            raise UserError(f"{different[0]}: a resumed run must have as many as the one in {directory} began with")
    if different and not force:
        raise UserError(
            f"{'; '.join(different)}: expected what the run in {directory} began with; give the new place of that, or "
            "--force-resume (in Python force_resume=True) to continue with this"
        )
    try:
        check(state, len(stage.metrics) + 1, stage.model.config.vocab_size)
    except UserError as error:
        if different:
            raise UserError(f"{'; '.join(different)}: does not fit the run: {error}") from error
        raise
    if checkpoint.step > recipe.optimiser.steps:
        raise UserError(f"{checkpoint.path}: expected at most step {recipe.optimiser.steps}, the run's last")
    if different:
        saved_count, count = (len(_sources(x)) for x in (state["data"]["records"], stage.batches.records.state_dict()))
        if saved_count != count:
            raise UserError(
                f"{checkpoint.path}: data.records: expected positions of {count} sources, got {saved_count}"
            )
        stage.notes += (f"resumed with {'; '.join(different)} than before",)
        data = state["data"]
        data["records"] = resized(data["records"], stage.batches.records.state_dict())
    return state


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return what differs between the fingerprints of a checkpoint and those of the run that resumes from it.

    Args:
        saved: of the checkpoint.
        now: of the resumed run.
        names: of the training sources, in messages.
    """
    different = []
    if len(saved["sources"]) != len(now["sources"]):
        return [f"data: {len(now['sources'])} sources in place of {len(saved['sources'])}"]
    for index, name in enumerate(names[: len(saved["sources"])]):
        if saved["sources"][index] != now["sources"][index]:
            sizes = saved["sizes"][index], now["sizes"][index]
            counts = f"{sizes[1]:,} in place of {sizes[0]:,}" if sizes[0] != sizes[1] else f"also {sizes[1]:,}"
            different.append(f"{name}: other records ({counts})")
    if saved["tokenizer"] != now["tokenizer"]:
        different.append("model.tokenizer: another tokenizer")
    if saved["model"] != now["model"]:
        different.append("model: another configuration")
    if saved["evaluation"] == now["evaluation"]:  # another choice of sources is no surprise
        for name, after in now["held_out"].items():
            if saved["held_out"].get(name, after) != after:
                different.append(f"evaluation.sources: {name}: other records")
    return different


def check(state: Section, metrics: int, vocabulary: int) -> None:
    """Raise UserError, which begins with the state's file and the key, for a value that no run saves.

    Args:
        state: JSON state of a checkpoint.
        metrics: number of metrics of a step, whose sums the state holds.
        vocabulary: number of tokens.
    """
    whole = "a whole number from 0"
    for key in ("optimiser", "generators"):
        state.section(key)
    window, data = state.section("window"), state.section("data")
    state.require("guard", _guard, "4 numbers, the first and the last from 0")
    state.require("forget", count, "a step")
    state.require("evaluation", _numbers_by_name, "numbers by name")
    state.require("best", _best, "null, or step, figure and value")
    if "evaluation_due" in state:
        state.require("evaluation_due", _boolean, "true or false")
    sums = _list_of(lambda value: value is None or number(value), metrics)
    window.require("sums", sums, f"{metrics} numbers or null")
    for key in ("steps", "tokens", "all_tokens", "skipped"):
        window.require(key, count, whole)
    for key in ("seconds", "flops"):
        window.require(key, amount, "a finite number from 0")
    records = data.section("records")
    position = records.require("position", count, whole)
    sources = [records]
    if "sources" in records:
        values = records.require("sources", _sections, "a list of sections")
        sources = [Section(value, state.path, f"{records.key}.sources.{i}") for i, value in enumerate(values)]
    for source in sources:
        source.require("position", count, whole)
        source.require("size", count, whole)
    if sum(source["position"] for source in sources) != position:
        raise UserError(
            f"{state.path}: {records.key}.position: expected the sum of its sources' positions, got {position}"
        )
    for key, others in (("tokens", ()), ("targets", (IGNORED,))):
        if key in data:
            fits = lambda token, others=others: type(token) is int and (0 <= token < vocabulary or token in others)  # noqa: E731
            data.require(key, _list_of(_list_of(fits)), f"lists of tokens below {vocabulary}")
    if "targets" in data and list(map(len, data["tokens"])) != list(map(len, data["targets"])):
        raise UserError(f"{state.path}: data.targets: expected as many as data.tokens, got other numbers")
    if "refused" in data:
        data.require("refused", _counts_by_name, "counts by reason")


def resized(records: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's saved state for the sources that a forced resume continues with; positions stay.

    Args:
        records: saved state.
        now: state of the new sampler, over as many sources; one source may have a section of its own or none.
    """
    sources = []
    for saved, current in zip(_sources(records), _sources(now), strict=True):
        sources.append({"position": saved["position"], "size": current["size"]})
    return {"position": records["position"], "sources": sources} if "sources" in now else sources[0]


def _sources(records: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return records.get("sources", [records])


# Saving and loading


def save_start(trainer: Trainer) -> None:
    """Save the weights that training does not change and, if a recipe names the model, how to make it again."""
    model, names = trainer.full_model, trainer.recipe.model

    def save_configuration(folder: Path) -> None:
        model.config.save_pretrained(folder)
        trainer.stage.tokenizer.save_pretrained(folder)

    in_memory = names.path is None and names.config is None
    state = {"untrained_heads": sorted(model.untrained_heads)}
    trainer.run.save_start(_unchanged(trainer), state, None if in_memory else save_configuration)


def load_start(trainer: Trainer) -> None:
    """Load the weights that :func:`save_start` saved."""
    start = trainer.run.load_start()
    check_tensors(_unchanged(trainer), start, trainer.run.directory / "start" / "start.safetensors")
    copy_weights(start, trainer.weights)


def _unchanged(trainer: Trainer) -> dict[str, Tensor]:
    """Return the starting weights that a resume needs: frozen ones, and all for a reference model."""
    unchanged = {}
    for name, p in trainer.weights.items():
        if trainer.stage.needs_reference or not p.requires_grad:
            unchanged[name] = p
    return unchanged


def copy_weights(tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Copy full tensors into parameters of the same names, which may be shards."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            params[name].copy_(shard_like(tensor, params[name]))


def save(trainer: Trainer, undo_batch: bool) -> None:
    """Save a checkpoint; with ``undo_batch``, the position in the data is that before the last batch."""
    optimiser, optimiser_state = trainer.optimiser.to_tensors(trainer.names)
    data, data_state = trainer.stage.state(undo_batch=undo_batch)
    generators, generators_state = checkpointing.random_states()
    weights = trainer.optimiser.weights(trainer.names)
    tensors = {"weights": weights, "optimiser": optimiser, "data": data, "generators": generators}
    state = {
        "optimiser": optimiser_state,
        "data": data_state,
        "window": trainer.means.state(),
        "guard": trainer.guard.state(),
        "forget": trainer.memory_reset_step,
        "evaluation": trainer.evaluation,
        "best": trainer.best.state,
        "evaluation_due": trainer.evaluation_due,
        "generators": generators_state,
        "fingerprints": trainer.fingerprints,
    }
    trainer.run.save(trainer.step, tensors, state)


def load(trainer: Trainer, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Load the tensors of a checkpoint, and its ``state``, which :func:`accept` returned."""
    params = {name: p for p, name in trainer.names.items()}
    weights, saved = checkpoint.tensors("weights"), checkpoint.tensors("optimiser")
    check_tensors(params, weights, checkpoint.path / "weights.safetensors")
    moments = {}
    for name, p in params.items():
        moments |= {f"{name}/exp_avg": p, f"{name}/exp_avg_sq": p}
        if f"{name}/prior" in saved:  # not in groups without prior decay, of which from_tensors makes sure
            moments[f"{name}/prior"] = p
    check_tensors(moments, saved, checkpoint.path / "optimiser.safetensors")
    copy_weights(weights, params)
    optimiser = {}
    with checkpointing.loading(checkpoint.path / "optimiser.safetensors"):
        for key, tensor in saved.items():
            name = key.rpartition("/")[0]
            optimiser[key] = shard_like(tensor, params[name])
        trainer.optimiser.from_tensors(trainer.names, optimiser, state["optimiser"])
    data = checkpoint.tensors("data")
    with checkpointing.loading(checkpoint.path):
        trainer.stage.load_state(data, state["data"])
    trainer.means.load(state["window"])
    trainer.guard.load(state["guard"])
    trainer.memory_reset_step = state["forget"]
    trainer.evaluation = state["evaluation"]
    trainer.evaluation_due = state.get("evaluation_due", False)
    trainer.best.load(_available_best(trainer, state["best"], checkpoint))
    generators = checkpoint.tensors("generators")
    with checkpointing.loading(checkpoint.path / "generators.safetensors"):
        checkpointing.set_random_states(generators, state["generators"])


def _available_best(trainer: Trainer, best: dict[str, Any] | None, newest: Checkpoint) -> dict[str, Any] | None:
    """Return the best step, or None if its checkpoint is damaged."""
    if best is None or best["step"] == newest.step:
        return best
    path = trainer.run.checkpoint_path(best["step"])
    damage = checkpointing.damage(path) if trainer.world.rank == 0 else None
    damage = trainer.world.all_gather_object(damage)[0]
    if damage is None:
        return best
    log.warning("%s, the best, is not complete (%s): the next to be evaluated is the best", path, damage)
    return None
