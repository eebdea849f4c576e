"""Comparable training steps: shapes, contenders, and the check that all compute the same.

Ours runs ``dph.train.trainer.Trainer`` step by step, as its loop does; only the run directory stays empty.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import dph
from benchmarks import lengths, trl_rival
from benchmarks.paper_layout import PaperTrainer
from dph.data.packing import PackedBatch, pack
from dph.losses import IGNORED
from dph.train import build, recipe, run_dir
from dph.train.budget import flops, memory
from dph.train.cuda_graph import WARMUP_CALLS
from dph.train.progress import Progress
from dph.train.stages.base import Stage
from dph.train.stages.preference import PairMicroBatch, PreferenceStage
from dph.train.trainer import Trainer
from dph_kernels import dispatch

PAIRS = ("align", "head")
MARKS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "im_end_token_id": 3}  # of lengths.small_tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """Sizes of a model and of its optimizer steps.

    Attributes:
        model: arguments of :class:`dph.ModelConfig`; the others have the paper's size.
        context: tokens of a stream's segment.
        memory: tokens of its Transformer-XL memory.
        streams, pairs: per step.
        micro_streams, micro_pairs: per micro-batch.
        tokens: of our micro-batch of pairs with shared prompts, as in shipped recipes; None: ``micro_pairs`` pairs.
        pad: length that the paper's layout pads pairs to; longer pairs are left out.
    """

    name: str
    model: dict[str, Any]
    context: int
    memory: int
    streams: int
    micro_streams: int
    pairs: int
    micro_pairs: int
    tokens: int | None = None
    pad: int = 512


def _model(
    vocabulary: int, embedding: int, hidden: int, ffn: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    names = ("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = dict(zip(names, (vocabulary, embedding, hidden, ffn, layers), strict=True))
    return {**sizes, "num_attention_heads": heads, **more}


PAPER = Shape(
    name="551M", model={}, context=2048, memory=2048, streams=128, micro_streams=16, pairs=64, micro_pairs=16,
    tokens=16384,
)  # fmt: skip
MINIATURE = Shape(
    name="5M", model=_model(8192, 128, 256, 704, 4, 4), context=256, memory=256, streams=8, micro_streams=8, pairs=16,
    micro_pairs=16,
)  # fmt: skip
TINY = Shape(  # for checks; weights large enough to matter
    name="tiny", model=_model(400, 24, 64, 48, 2, 2, initializer_range=0.1), context=40, memory=60, streams=4,
    micro_streams=2, pairs=6, micro_pairs=3, tokens=600, pad=220,
)  # fmt: skip
FAMILY = Shape(  # steps of a Llama-family model, which brings its sizes; without memory, as its own trainers
    name="family", model={}, context=256, memory=0, streams=4, micro_streams=4, pairs=8, micro_pairs=8,
)  # fmt: skip
FEW_PAIRS = "batch.micro=2"  # for TRL: the logits of eight padded pairs fill 20 GB at a vocabulary of 49,152
FAMILY_TINY = dataclasses.replace(TINY, model={}, context=200, memory=0)  # rows with targets, even the first
FAMILY_GPU = Shape(
    name="family", model={}, context=2048, memory=0, streams=32, micro_streams=8, pairs=64, micro_pairs=16,
    tokens=16384,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage at a shape, on a device.

    Attributes:
        lowered: bf16 with fp32 master weights; else fp32.
        model: directory of a Llama-family model, whose weights all contenders start from; None: new weights of the
            shape's sizes.
        dropout: of the reward head; steps are comparable only without it.
        overrides: of the stage's shipped recipe, in addition to the sizes.
    """

    stage: str
    shape: Shape
    model: str | None = None
    device: str = "cpu"
    lowered: bool = False
    dropout: float = 0.1
    overrides: tuple[str, ...] = ()

    def recipe(self) -> recipe.Recipe:
        """Return the shipped recipe of the stage at the shape's sizes, without a cache: as in the first epoch."""
        shape = self.shape
        size, micro = (shape.pairs, shape.micro_pairs) if self.stage in PAIRS else (shape.streams, shape.micro_streams)
        context = shape.pad if self.stage in PAIRS else shape.context
        values = {
            "batch.size": size, "batch.micro": micro, "data.context": context, "data.memory": shape.memory,
            "precision": "bf16" if self.lowered else "fp32", "device": self.device, "data.cache_states": "false",
            "batch.tokens": "null",
        }  # fmt: skip
        name = "paper-head" if self.stage == "head" else self.stage
        return recipe.load(name, [*(f"{key}={value}" for key, value in values.items()), *self.overrides])

    def with_overrides(self, *more: str) -> "Job":
        """Return the job with more overrides."""
        return dataclasses.replace(self, overrides=(*self.overrides, *more))

    def packed(self) -> "Job":
        """Return the job with as many pairs per micro-batch as fit into ``shape.tokens``."""
        if self.stage not in PAIRS or self.shape.tokens is None:
            return self
        return self.with_overrides("batch.micro=null", f"batch.tokens={self.shape.tokens}")

    def config(self) -> dph.ModelConfig:
        """Return the model's configuration."""
        if self.model is not None:
            return dph.ModelConfig.from_pretrained(self.model, **self._fields())
        return dph.ModelConfig(**self.shape.model, **self._fields())

    def _fields(self) -> dict[str, Any]:
        return {**MARKS, "reward_dropout": self.dropout}

    def make_model(self) -> dph.Model:
        """Return a model, the same in every call."""
        torch.manual_seed(0)
        if self.model is not None:
            heads = self.recipe().objective.heads if self.stage in PAIRS else ()
            return dph.Model.from_pretrained(self.model, **self._fields(), reward_heads=heads).to(self.device)
        with torch.device(self.device):
            return dph.Model(self.config())

    def records(self) -> list[Any]:
        """Return the pairs of one step, so that all steps are equally long; or many conversations for streams."""
        vocabulary, shape = self.config().vocab_size, self.shape
        if self.stage in PAIRS:
            return lengths.pairs(shape.pairs, vocabulary, shape.pad)
        return lengths.conversations(min(shape.streams * 6, 384), vocabulary, 8 * shape.context)

    def make_stage(self) -> Stage:
        """Return a new stage on a fresh model, the same in every call."""
        return build.make_stage(self.recipe(), self.make_model(), lengths.small_tokenizer(), self.records(), {})

    def amounts(self) -> flops.Workload:
        """Return the workload of one step, the mean of several, with full memories."""
        shape = self.shape
        if self.stage in PAIRS:
            return flops.pairs_workload(self.records())
        batches, segments = self.make_stage().batches, 16
        targets = sum(int((next(batches)[1] != IGNORED).sum()) for _ in range(segments))
        return flops.streams_workload(shape.streams, shape.context, shape.memory, targets // segments)

    def needs(self, amounts: flops.Workload) -> float:
        """Return the necessary operations of a step of ``amounts``."""
        return flops.step_flops(self.config(), self.stage, amounts)


# Contenders


class Stepping(Protocol):
    """Interface of a contender's training."""

    watch: Callable[[dict[str, Tensor]], None] | None  # receives every step's gradients, by our names

    def step(self) -> Tensor:
        """Take one optimizer step and return its loss."""

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights in full precision, by our names."""


class Unsaved(run_dir.RunDirectory):
    """A run directory that holds nothing but the configuration."""

    def save_start(self, *args: Any) -> None:
        """Do nothing: the run is never resumed."""

    def log(self, *args: Any) -> None:
        """Do nothing."""


class Ours:
    """Our trainer, driven as in its loop: the metrics of a step are read while the next step runs."""

    def __init__(self, stage: Stage, directory: tempfile.TemporaryDirectory | None = None) -> None:
        self.watch = None
        self._directory = tempfile.TemporaryDirectory() if directory is None else directory
        run = Unsaved(self._directory.name, stage.recipe.as_dict())
        self.trainer = Trainer(stage.recipe, stage, run, quiet=True)
        self.trainer.model.train()
        self.trainer.optimiser.register_step_pre_hook(self._show)
        self.progress, self.taken = Progress("", 1 << 30, 0, quiet=True), 0

    def _show(self, *_: Any) -> None:
        if self.watch is not None:
            self.watch({name: p.grad for p, name in self.trainer.names.items()})

    def step(self) -> Tensor:
        """Take one step of ``Trainer.train``, without evaluation and checkpoints."""
        self.taken += 1
        metrics = self.trainer.train_step(self.taken)
        self.trainer.log_pending(self.progress)
        self.trainer.pending = metrics
        return sum(loss.total for loss in metrics.losses) / metrics.batch.weight

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights."""
        return self.trainer.optimiser.weights(self.trainer.names)

    def estimated_peak(self) -> float:
        """Return the estimate of the peak bytes in use during a step (``dph.train.budget``); takes a batch."""
        stage = self.trainer.stage
        parts = stage.next_batch().micro_batches
        rows, device = max(part.rows for part in parts), self.trainer.model.device
        sizes = memory.on_device(stage, rows, device, stage.memory_place, alone=len(parts) == 1)
        return sum(sizes.values())


def with_states(job: Job, *more: str) -> Ours:
    """Return ours in stage head on cached states, as from the second epoch on."""
    directory = tempfile.TemporaryDirectory()
    cached = job.packed().with_overrides("data.cache_states=true", f"data.cache={directory.name}/cache", *more)
    return Ours(cached.make_stage(), directory)


class UnsharedMicroBatch(PairMicroBatch):
    """Pairs with a copy of the prompt for each answer."""

    length = staticmethod(lambda pair: sum(map(len, pair)))

    @functools.cached_property
    def packed(self) -> PackedBatch:
        """Packed batch, each answer a document."""
        return pack([[side] for pair in self.pairs for side in pair])


def unshared(stage: PreferenceStage) -> PreferenceStage:
    """Change a stage to a copy of the prompt for every answer: packed, without padding, without sharing."""
    stage.micro_batch_class = UnsharedMicroBatch
    return stage


class Contender(NamedTuple):
    """An implementation of a training step.

    Attributes:
        who: its name.
        make: returns its training of a job.
        kind: the goal that it counts for.
        check: its own check, if it computes something else than ours.
        missing: reason why it cannot run on this machine.
        cached: whether it reads cached states instead of running the backbone.
    """

    who: str
    make: Callable[[Job], Stepping]
    kind: str | None = None
    check: Callable[[Job], None] | None = None
    missing: str | None = None
    cached: bool = False


def contenders(stage: str, pad: int) -> list[Contender]:
    """Return ours first, then all contenders that can train ``stage``."""
    paper = lambda **how: lambda job: PaperTrainer(job.make_stage(), job.lowered, **how)  # noqa: E731
    ours = [
        Contender("ours", lambda job: Ours(job.packed().make_stage()), "ours"),
        Contender(
            "ours, torch.compile", lambda job: Ours(job.packed().with_overrides("compile=true").make_stage()), "ours"
        ),
    ]
    if stage not in PAIRS:
        return [*ours, Contender("paper_layout", paper(), "paper_layout"),
                Contender("paper_layout, torch.compile", paper(compiled=True))]  # fmt: skip
    no_sharing = "padding-free, no sharing"
    name = f"paper_layout, padded to {pad}"
    return [
        *ours,
        *(CACHED if stage == "head" else []),
        Contender(no_sharing, lambda job: Ours(unshared(job.packed().make_stage())), no_sharing),
        Contender(name, paper(pad=pad), "paper_layout"),
        Contender(f"{name}, torch.compile", paper(pad=pad, compiled=True)),
        Contender("paper_layout, padded to the longest", paper(pad=None)),
        *([TRL] if stage == "align" else []),
    ]


CACHED = [
    Contender("ours, cached states", with_states, "ours", cached=True),
    Contender(
        "ours, cached states, CUDA graph",
        lambda job: with_states(job, "cuda_graph=true"),
        "ours",
        missing=dispatch.missing("laprop", "cuda", "cuda"),
        cached=True,
    ),
]

TRL = Contender(
    "TRL DPOTrainer, a Llama as large, no reward",
    trl_rival.TrlTrainer,
    check=trl_rival.check,
    missing=trl_rival.MISSING,
)


# The check


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all tensors, relative to that of ``want``."""
    assert got.keys() == want.keys(), f"expected the tensors {sorted(want)}, got {sorted(got)}"
    off = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    return (off / sum(float(want[name].double().square().sum()) for name in want)) ** 0.5


def check(contender: Contender, job: Job, steps: int = 3) -> None:
    """Compare a contender with ours in fp32 without dropout, or run its own check.

    First the loss, and the gradient of every tensor, of ``steps`` steps at learning rate 0, during which a stream's
    memory grows longer than its context; then the change of the weights over as many steps. ``WARMUP_CALLS`` more steps
    precede, after which a CUDA graph is replayed.
    """
    steps += WARMUP_CALLS
    ours = contenders(job.stage, job.shape.pad)[0]
    job = dataclasses.replace(job, lowered=False, dropout=0.0)
    if contender.check is not None:
        return contender.check(job)
    for rate in (0.0, 1e-3):  # a decay that shows within a few steps
        overrides = (f"optimiser.lr={rate}", "optimiser.final_lr=0", "optimiser.warmup=2", "optimiser.prior_decay=50")
        still = job.with_overrides(*overrides)
        with every_kernel():
            _compare(contender.make(still), ours.make(still), steps, moves=rate > 0)


@contextlib.contextmanager
def every_kernel() -> Iterator[None]:
    """Compute a tiny model with the kernels of a large one instead of plain PyTorch."""
    few, dispatch.SMALL_ELEMENTS = dispatch.SMALL_ELEMENTS, 0
    try:
        yield
    finally:
        dispatch.SMALL_ELEMENTS = few


# Relative tolerances. A GPU's fp32 products in attention split numbers into 11 bits, whose rounding the layers amplify
# beyond 1e-4, also between our own plain and compiled steps. The first steps depend on signs of gradients, of which the
# smallest are noise. Without priors the weights differ by 0.1.
GRADIENT = {"cpu": 1e-4, "cuda": 1e-3}
MOVED = {"cpu": 1e-3, "cuda": 3e-2}


def _compare(one: Stepping, other: Stepping, steps: int, moves: bool) -> None:
    seen: dict[Stepping, dict[str, Tensor]] = {}

    def store(training: Stepping, gradients: dict[str, Tensor]) -> None:
        seen[training] = {name: gradient.clone() for name, gradient in gradients.items()}

    start = {name: w.clone() for name, w in other.weights().items()}
    for training in (one, other):
        training.watch = functools.partial(store, training)
    for _ in range(steps):
        loss, expected = float(one.step()), float(other.step())
        if not moves:
            assert abs(loss - expected) <= 1e-5 * abs(expected), f"loss: expected {expected}, got {loss}"
            for name, gradient in seen[other].items():
                _check_gradient(name, seen[one][name], gradient, seen[other])
    if moves:
        changes = []
        for training in (one, other):
            changes.append({name: weight - start[name] for name, weight in training.weights().items()})
        allowed = MOVED[next(iter(start.values())).device.type]
        assert distance(*changes) <= allowed, f"weights moved otherwise, off by {distance(*changes):.1e}"


def _check_gradient(name: str, got: Tensor, want: Tensor, every: dict[str, Tensor]) -> None:
    """Compare relative to the gradient's norm and to the typical one: some, as of a key's bias, are nearly zero."""
    typical = sum(float(g.square().sum()) for g in every.values()) / sum(g.numel() for g in every.values())
    off, size = float((got - want).norm()), float(want.norm())
    allowed = GRADIENT[want.device.type] * (size + (typical * want.numel()) ** 0.5)
    assert off <= allowed, f"gradient of {name}: off by {off:.1e}, expected at most {allowed:.1e}"
