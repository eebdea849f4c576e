"""Steps of training that can be compared: shapes, who computes them, and the check that all compute the same.

Ours goes through ``dph.train.entry.Trainer``, step by step as its loop does; only the run directory stays empty.
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
from dph.train import entry, recipe, run_dir
from dph.train.budget import flops
from dph.train.cuda_graph import WARM
from dph.train.progress import Progress
from dph.train.stages.base import Stage
from dph.train.stages.preference import PairPart, PairStage
from dph_kernels import dispatch

PAIRS = ("align", "head")
MARKS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "im_end_token_id": 3}  # of lengths.small_tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model and of its updates.

    Attributes:
        model: arguments of :class:`dph.ModelConfig`; what is missing has the paper's size.
        context: tokens of a stream's segment; memory: tokens that it looks back on.
        streams, pairs: of an update; micro_*: of these, how many at a time.
        tokens: of pairs, prompts shared, that we take at a time, as shipped recipes do; None: ``micro_pairs``.
        pad: length that the paper's way pads pairs to; longer ones do not take part.
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage at a shape, on a device.

    Attributes:
        lowered: bf16 with fp32 masters; else fp32.
        dropout: of the reward head; only without it can steps be compared.
        overrides: of the stage's shipped recipe, beyond the sizes.
    """

    stage: str
    shape: Shape
    device: str = "cpu"
    lowered: bool = False
    dropout: float = 0.1
    overrides: tuple[str, ...] = ()

    def recipe(self) -> recipe.Recipe:
        """The shipped recipe of the stage at the shape's sizes, with nothing cached: as in the first epoch."""
        shape = self.shape
        size, micro = (shape.pairs, shape.micro_pairs) if self.stage in PAIRS else (shape.streams, shape.micro_streams)
        context = shape.pad if self.stage in PAIRS else shape.context
        values = {
            "batch.size": size, "batch.micro": micro, "data.context": context, "data.memory": shape.memory,
            "precision": "bf16" if self.lowered else "fp32", "device": self.device, "data.cache_states": "false",
            "batch.tokens": "null",
        }  # fmt: skip
        return recipe.load(self.stage, [*(f"{key}={value}" for key, value in values.items()), *self.overrides])

    def with_overrides(self, *more: str) -> "Job":
        """The same otherwise."""
        return dataclasses.replace(self, overrides=(*self.overrides, *more))

    def packed(self) -> "Job":
        """With as many pairs at a time as ``shape.tokens`` has room for."""
        if self.stage not in PAIRS or self.shape.tokens is None:
            return self
        return self.with_overrides("batch.micro=null", f"batch.tokens={self.shape.tokens}")

    def config(self) -> dph.ModelConfig:
        """The model's."""
        return dph.ModelConfig(**self.shape.model, **MARKS, reward_dropout=self.dropout)

    def records(self) -> list[Any]:
        """Pairs of one update, so that all updates are equally long; or conversations, of which many make one."""
        vocabulary, shape = self.config().vocab_size, self.shape
        if self.stage in PAIRS:
            return lengths.pairs(shape.pairs, vocabulary, shape.pad)
        return lengths.conversations(min(shape.streams * 6, 384), vocabulary, 8 * shape.context)

    def make_stage(self) -> Stage:
        """A stage that nobody uses yet, on a fresh model; always the same."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = dph.Model(self.config())
        return entry.make_stage(self.recipe(), model, lengths.small_tokenizer(), self.records(), {})

    def amounts(self) -> flops.Amounts:
        """What goes through the model in one update, in the mean of several; memories full."""
        shape = self.shape
        if self.stage in PAIRS:
            return flops.of_pairs(self.records())
        batches, segments = self.make_stage().batches, 16
        targets = sum(int((next(batches)[1] != IGNORED).sum()) for _ in range(segments))
        return flops.of_streams(shape.streams, shape.context, shape.memory, targets // segments)

    def needs(self, amounts: flops.Amounts) -> float:
        """Operations that an update of ``amounts`` needs at least."""
        return flops.step_flops(self.config(), self.stage, amounts)


# Who takes steps


class Stepping(Protocol):
    """Somebody's training."""

    watch: Callable[[dict[str, Tensor]], None] | None  # is shown every step's gradients, by our names

    def step(self) -> Tensor:
        """One update; its loss."""

    def weights(self) -> dict[str, Tensor]:
        """What trains, in full precision, by our names."""


class Unsaved(run_dir.Run):
    """A run directory that nothing but its configuration is written to."""

    def save_start(self, *args: Any) -> None:
        """Nothing: there will be no resume."""

    def log(self, *args: Any) -> None:
        """Nothing."""


class Ours:
    """Our trainer, driven as its loop drives it: the figures of a step are read while the next one runs."""

    def __init__(self, stage: Stage, directory: tempfile.TemporaryDirectory | None = None) -> None:
        self.watch = None
        self._directory = tempfile.TemporaryDirectory() if directory is None else directory
        run = Unsaved(self._directory.name, stage.recipe.as_dict())
        self.trainer = entry.Trainer(stage.recipe, stage, run, quiet=True)
        self.trainer.model.train()
        self.trainer.optimiser.register_step_pre_hook(self._show)
        self.progress, self.taken = Progress("", 1 << 30, 0, quiet=True), 0

    def _show(self, *_: Any) -> None:
        if self.watch is not None:
            self.watch({name: p.grad for p, name in self.trainer.names.items()})

    def step(self) -> Tensor:
        """One turn of ``Trainer._loop``."""
        self.taken += 1
        launched = self.trainer._launch(self.taken)
        self.trainer._settle(self.progress)
        self.trainer._launched = launched
        return sum(loss.total for loss in launched.losses) / launched.work.weight

    def weights(self) -> dict[str, Tensor]:
        """What trains."""
        return self.trainer.optimiser.weights(self.trainer.names)


def with_states(job: Job, *more: str) -> Ours:
    """Ours in stage head on cached states, as from the second epoch on."""
    directory = tempfile.TemporaryDirectory()
    cached = job.packed().with_overrides("data.cache_states=true", f"data.cache={directory.name}/cache", *more)
    return Ours(cached.make_stage(), directory)


class UnsharedPart(PairPart):
    """Pairs with a prompt for each answer."""

    @functools.cached_property
    def packed(self) -> PackedBatch:
        """Each answer a document."""
        return pack([[side] for pair in self.pairs for side in pair])


class Unshared(PairStage):
    """Our stage with every answer behind a prompt of its own: packed, nothing padded, nothing shared."""

    part = UnsharedPart
    length = staticmethod(lambda pair: sum(map(len, pair)))

    @classmethod
    def of(cls, stage: PairStage) -> "Unshared":
        """The same stage otherwise."""
        return cls(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(stage) if field.init})


class Contender(NamedTuple):
    """Who trains, and which goal that counts for.

    Attributes:
        check: of what it computes, where that is something else than ours does.
        missing: what it lacks here.
        cached: its backbone does not run.
    """

    who: str
    make: Callable[[Job], Stepping]
    kind: str | None = None
    check: Callable[[Job], None] | None = None
    missing: str | None = None
    cached: bool = False


def contenders(stage: str, pad: int) -> list[Contender]:
    """Ours first, then all who can train ``stage``."""
    paper = lambda **how: lambda job: PaperTrainer(job.make_stage(), job.lowered, **how)  # noqa: E731
    found = [
        Contender("ours", lambda job: Ours(job.packed().make_stage()), "ours"),
        Contender(
            "ours, torch.compile", lambda job: Ours(job.packed().with_overrides("compile=true").make_stage()), "ours"
        ),
    ]
    if stage not in PAIRS:
        return [*found, Contender("paper_layout", paper(), "paper_layout"),
                Contender("paper_layout, torch.compile", paper(compiled=True))]  # fmt: skip
    unshared = Contender(
        "padding-free, no sharing", lambda job: Ours(Unshared.of(job.packed().make_stage())), "padding-free, no sharing"
    )
    name = f"paper_layout, padded to {pad}"
    return [
        *found,
        *(CACHED if stage == "head" else []),
        unshared,
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
    """Norm of the difference of all tensors, in parts of that of ``want``."""
    assert got.keys() == want.keys(), f"expected the tensors {sorted(want)}, got {sorted(got)}"
    off = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    return (off / sum(float(want[name].double().square().sum()) for name in want)) ** 0.5


def check(contender: Contender, job: Job, steps: int = 3) -> None:
    """``contender`` computes what ours computes, in fp32 without dropout, or what its own check asks for.

    First the loss, and the gradient of every tensor, of ``steps`` updates at rate 0, through which a stream's memory
    comes to be longer than its context; then the way that the weights go in as many. Some more come first, after which
    a CUDA graph takes the others.
    """
    steps += WARM
    ours = contenders(job.stage, job.shape.pad)[0]
    job = dataclasses.replace(job, lowered=False, dropout=0.0)
    if contender.check is not None:
        return contender.check(job)
    for rate in (0.0, 1e-3):  # a decay that shows within a few steps
        overrides = (f"optimiser.lr={rate}", "optimiser.final_lr=0", "optimiser.warmup=2", "optimiser.prior_decay=50")
        still = job.with_overrides(*overrides)
        with _kernels():
            _compare(contender.make(still), ours.make(still), steps, moves=rate > 0)


@contextlib.contextmanager
def _kernels() -> Iterator[None]:
    """A tiny model is computed by the kernels that a large one is, not left to plain PyTorch."""
    few, dispatch.FEW = dispatch.FEW, 0
    try:
        yield
    finally:
        dispatch.FEW = few


# In parts of their own size. A GPU's fp32 products in attention are made of parts of 11 bits, whose rounding the layers
# amplify: beyond 1e-4, also between our own steps, plain and compiled. The first steps go by signs of gradients, of
# which the smallest are noise. Without priors weights are 0.1 apart.
GRADIENT = {"cpu": 1e-4, "cuda": 1e-3}
MOVED = {"cpu": 1e-3, "cuda": 3e-2}


def _compare(one: Stepping, other: Stepping, steps: int, moves: bool) -> None:
    seen: dict[Stepping, dict[str, Tensor]] = {}
    start = {name: w.clone() for name, w in other.weights().items()}
    for who in (one, other):
        who.watch = lambda found, who=who: seen.update({who: {name: g.clone() for name, g in found.items()}})
    for _ in range(steps):
        loss, expected = float(one.step()), float(other.step())
        if not moves:
            assert abs(loss - expected) <= 1e-5 * abs(expected), f"loss: expected {expected}, got {loss}"
            for name, gradient in seen[other].items():
                _check_gradient(name, seen[one][name], gradient, seen[other])
    if moves:
        ways = [{name: w - start[name] for name, w in who.weights().items()} for who in (one, other)]
        allowed = MOVED[next(iter(start.values())).device.type]
        assert distance(*ways) <= allowed, f"weights moved otherwise, off by {distance(*ways):.1e}"


def _check_gradient(name: str, got: Tensor, want: Tensor, every: dict[str, Tensor]) -> None:
    """Off by little of its own size, or of the typical gradient's: some, as of a key's bias, are next to nothing."""
    typical = sum(float(g.square().sum()) for g in every.values()) / sum(g.numel() for g in every.values())
    off, size = float((got - want).norm()), float(want.norm())
    allowed = GRADIENT[want.device.type] * (size + (typical * want.numel()) ** 0.5)
    assert off <= allowed, f"gradient of {name}: off by {off:.1e}, expected at most {allowed:.1e}"
