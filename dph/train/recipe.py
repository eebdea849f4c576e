"""Recipes: what one training stage does, as a typed and frozen configuration read from YAML.

    base: sft                # a shipped recipe, or a file beside this one, which may have a base, too
    data:
      sources: [corpus.jsonl, {source: "task:glue/sst2", weight: 2}]
    optimiser:
      lr: 3e-5

``load("sft", ["optimiser.lr=1e-4", "data.sources=[corpus.jsonl]"])`` reads a shipped recipe or a file and applies
overrides, whose values are YAML. An unknown key or a value of the wrong type is a :class:`UserError` that names it.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dph.errors import UserError
from dph.train import config_schema

SHIPPED = Path(__file__).parent / "recipes"
KINDS = {
    "pretrain": "text",
    "vocab": "conversation",
    "sft": "conversation",
    "align": "preference",
    "head": "preference",
}
typed = dataclass(frozen=True, kw_only=True, slots=True)


@typed
class Start:
    """The model that the stage starts from: ``path``, or fresh weights of ``config``'s sizes.

    Attributes:
        path: model directory or hub name; the own format or a released ``lsw_transformer`` one.
        config: arguments of :class:`dph.ModelConfig` for fresh weights.
        tokenizer: tokenizer directory or hub name; None takes the one in ``path``.
        embeddings: model directory or hub name to take the token embedding from (the paper: facebook/opt-125m), fresh
            weights only.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    embeddings: str | None = None


@typed
class Source:
    """One source of records; in YAML a bare text stands for its ``source``.

    Attributes:
        source: ``task:NAME`` (``dph.tasks``), ``hub:NAME[:CONFIG]``, a JSONL or text file, or a folder of such files.
        split: which split of a task or hub data set.
        directory: folder of tasks' local files, ``<task>/<split>.jsonl``, in place of the hub; None: the section's.
        weight: share in the mixture, relative to the others' weights.
        limit: use only the first records.
        text_field: the field that holds plain text (stage pretrain).
    """

    source: str
    split: str | None = None
    directory: str | None = None
    weight: float = 1.0
    limit: int | None = None
    text_field: str = "text"


@typed
class Data:
    """What is read, and how it is cut.

    Attributes:
        sources: the mixture.
        directory: folder of tasks' local files for all sources; None: the hub.
        consecutive: samples of one source in a row before another is drawn (streams).
        context: tokens S of a segment of a stream; for preference stages the longest answer with its prompt, and pairs
            with a longer one are left out.
        memory: tokens of Transformer-XL memory that a stream carries; 0 for none.
        memory_kind: "kv", or "hidden" (recompute_kv of the released configuration).
        memory_place: "device", "host" (pinned, copied while the device computes), or "auto": the device where all fits
            (``dph.train.budget.memory``). Changes no result; a resumed run may have another.
        cache: folder of what frozen models said of the data (``dph.train.precompute.pairs``); None: ``cache`` beside the run
            directory, which runs side by side share.
        cache_states: stage head keeps the frozen backbone's states of judged tokens there, and goes through the
            backbone once a pair: 8 * hidden_size bytes a pair, 6 GB for the 491,520 pairs of the recipe ``head``.
        workers: processes that read and encode the training records ahead, as many for each of several processes that
            train; 0: the training process does it when it needs them. Changes no result.
    """

    sources: tuple[Source, ...] = ()
    directory: str | None = None
    consecutive: int = 5
    context: int = 2048
    memory: int = 2048
    memory_kind: Literal["kv", "hidden"] = "kv"
    memory_place: Literal["auto", "device", "host"] = "auto"
    cache: str | None = None
    cache_states: bool = True
    workers: int = 0


@typed
class Optimiser:
    """LaProp and its schedule.

    Attributes:
        lr: peak learning rate, reached at step ``warmup`` on a straight line.
        final_lr: learning rate of the last step, reached on half a cosine.
        warmup: steps of warm-up.
        steps: updates in all.
        betas: coefficients of momentum and second moment.
        eps: added to the second moment's root.
        weight_decay: pull towards zero, times the learning rate.
        prior_decay: pull towards the stage's first weights, times the learning rate.
        no_decay: a parameter whose name contains one of these words has neither decay.
        clip: bound of the gradient's global norm.
    """

    lr: float = 3e-5
    final_lr: float = 0.0
    warmup: int = 200
    steps: int = 6144
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    prior_decay: float = 0.0
    no_decay: tuple[str, ...] = ("norm", "bias", "embedding")
    clip: float = 1.0


@typed
class Batch:
    """How much goes into one update.

    Attributes:
        size: sequences (streams) or pairs per update.
        micro: of these, how many at a time; None for all. Changes memory use, not the result.
        tokens: in place of micro, and for pairs only: parts of at most so many tokens, prompts shared, the longest pair
            first. A pair that takes more by itself is left out.

    In stage head both are of the backbone's pass; the heads judge all pairs at once.
    """

    size: int = 128
    micro: int | None = None
    tokens: int | None = None


@typed
class Objective:
    """The joint preference objective (stages align and head; arXiv 2405.20053, section 3).

    Attributes:
        beta: strength of cDPO's implicit reward.
        dpo_epsilon: label smoothing of cDPO.
        dph_epsilon: label smoothing of the reward's loss.
        objective: the reward's loss.
        dpo_weight: weight of cDPO; 0 switches it off, and then no reference model is kept. Stage head ignores it.
        dph_weight: weight of the reward's loss.
        heads: names of the reward heads that train.
        pooler: pooler of heads that the model does not have yet; None keeps the model's.
        dropout: the heads' dropout; None keeps the model's.
        reference: cDPO's reference log-probabilities, computed on the fly in every step, or kept in ``data.cache`` (40
            bytes a pair) and computed once a pair. Both give the same weights, bit for bit in the first epoch.
    """

    beta: float = 0.6
    dpo_epsilon: float = 0.25
    dph_epsilon: float = 0.1
    objective: Literal["separable", "contrastive"] = "separable"
    dpo_weight: float = 1.0
    dph_weight: float = 1.0
    heads: tuple[str, ...] = ("default",)
    pooler: Literal["identity", "bert", "t5", "swiglu_bert", "swiglu_t5"] | None = None
    dropout: float | None = None
    reference: Literal["fly", "cache"] = "fly"


@typed
class Guard:
    """What happens to an update that would do harm: it is skipped and counted, and the weights stay as they are.

    Attributes:
        stop_after: so many skipped in a row end the run, the weights as they were before the first. Where streams have
            memory, a step that was not finite takes the next one with it, after which the memory begins anew.
        spike: beside updates whose loss or gradient is not finite, skip those whose loss lies so many standard
            deviations above its running mean; None skips none of them.
    """

    stop_after: int = 3
    spike: float | None = None


@typed
class Evaluation:
    """Held-out records.

    Attributes:
        sources: where they come from; none: no evaluation.
        directory: folder of tasks' local files for all sources; None: the hub.
        every: steps between evaluations; 0 for only after the last step.
    """

    sources: tuple[Source, ...] = ()
    directory: str | None = None
    every: int = 0


@typed
class Output:
    """The run directory.

    Attributes:
        directory: its place; the finished model lies in its ``model`` folder.
        save_every: steps between checkpoints; 0 for only on SIGTERM or Ctrl-C.
        keep: how many checkpoints stay.
        best: name of a held-out figure (``loss``, ``reward_accuracy``, ``reward_accuracy/glue/rte`` ...): the step that
            was best by it is saved when it is evaluated, and its checkpoint stays, too (``dph.train.best_checkpoint``).
        log_every: steps between lines of ``metrics.jsonl``, which hold means over these steps.
        tracker: where these lines go, too, beside TensorBoard: Weights & Biases or trackio (``dph.train.trackers``).
        project: of the run there.
    """

    directory: str = "runs/stage"
    save_every: int = 500
    keep: int = 2
    best: str | None = None
    log_every: int = 10
    tracker: Literal["wandb", "trackio"] | None = None
    project: str = "dph"


@typed
class Recipe:
    """One stage of training.

    Attributes:
        stage: pretrain, vocab (embedding only), sft, align (all and head) or head (head only).
        seed: of fresh weights, order of data and dropout.
        checkpointing: none, or block: blocks are computed again in the backward pass, which saves most of the memory of
            activations for a third more arithmetic and changes no result; a resumed run may have another.
        compile: compile what the blocks do around attention (``dph.train.compile``): the same but for rounding. Takes a
            C++ compiler (on a GPU: a C compiler and triton) and up to a minute at the start. On one CPU core, in
            miniature, steps were 1.04 to 1.07 times as fast; on an H200, at the paper's size, those of sft 0.95 times,
            since our own kernels fuse as much, and those of align no faster. A resumed run may have another.
        cuda_graph: stage head, in one process on a GPU, records the step of its heads once and replays it, without the
            launches that make most of it once the backbone's states are cached (``dph.train.cuda_graph``). Yet to be timed on a
            GPU. A resumed run may have another.
        precision: fp32, bf16 (with fp32 masters), or auto: bf16 on a GPU, fp32 on a CPU.
        device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        parallel: of the processes that torchrun starts (``dph.train.distributed``), each keeps a shard of the weights and the
            optimiser's state (shard), or all of them (replicate), which takes more memory and less exchange.
    """

    stage: Literal["pretrain", "vocab", "sft", "align", "head"]
    model: Start = field(default_factory=Start)
    data: Data = field(default_factory=Data)
    optimiser: Optimiser = field(default_factory=Optimiser)
    batch: Batch = field(default_factory=Batch)
    objective: Objective = field(default_factory=Objective)
    guard: Guard = field(default_factory=Guard)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)
    seed: int = 0
    checkpointing: Literal["none", "block"] = "none"
    compile: bool = False
    cuda_graph: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    parallel: Literal["shard", "replicate"] = "shard"

    def __post_init__(self) -> None:
        """Raise UserError where a value lies outside its range."""
        for pattern, low, high in RANGES:
            name = pattern.removesuffix(".*").split(".")[-1]
            for key, value in _values(self, pattern):
                if value is not None and not low <= value < high:
                    raise UserError(f"{key}: expected {low} <= {name} < {high}, got {value}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device: expected auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")
        if self.optimiser.warmup > self.optimiser.steps:
            raise UserError(
                f"optimiser.warmup: expected at most steps {self.optimiser.steps}, got {self.optimiser.warmup}"
            )
        if self.batch.micro and self.batch.size % self.batch.micro:
            raise UserError(f"batch.micro: expected a divisor of batch.size {self.batch.size}, got {self.batch.micro}")
        if self.cuda_graph and self.stage != "head":
            raise UserError(f"cuda_graph: expected false in stage {self.stage}, whose steps differ in shape, got true")
        if self.output.best is not None and not self.evaluation.every:
            raise UserError(f"evaluation.every: expected at least 1 beside output.best {self.output.best}, got 0")
        if self.batch.tokens is not None and (self.batch.micro or self.kind != "preference"):
            other = f"beside batch.micro {self.batch.micro}" if self.batch.micro else f"in stage {self.stage}"
            raise UserError(f"batch.tokens: expected none {other}, got {self.batch.tokens}")

    @property
    def kind(self) -> str:
        """What the stage's records are: text, conversation or preference."""
        return KINDS[self.stage]

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as in JSON; ``from_dict`` reads them."""
        return config_schema.plain(dataclasses.asdict(self))


INFINITE = float("inf")
RANGES = (  # key (* stands for each item of a list), least value, bound
    ("data.sources.*.weight", 0, INFINITE),
    ("data.sources.*.limit", 1, INFINITE),
    ("data.consecutive", 1, INFINITE),
    ("data.context", 1, INFINITE),
    ("data.memory", 0, INFINITE),
    ("data.workers", 0, INFINITE),
    ("optimiser.lr", 0, INFINITE),
    ("optimiser.final_lr", 0, INFINITE),
    ("optimiser.warmup", 0, INFINITE),
    ("optimiser.steps", 1, INFINITE),
    ("optimiser.betas.*", 0, 1),
    ("optimiser.eps", 0, INFINITE),
    ("optimiser.weight_decay", 0, INFINITE),
    ("optimiser.prior_decay", 0, INFINITE),
    ("optimiser.clip", 1e-12, INFINITE),
    ("batch.size", 1, INFINITE),
    ("batch.micro", 1, INFINITE),
    ("batch.tokens", 1, INFINITE),
    ("objective.beta", 0, INFINITE),
    ("objective.dpo_epsilon", 0, 0.5),
    ("objective.dph_epsilon", 0, 0.5),
    ("objective.dpo_weight", 0, INFINITE),
    ("objective.dph_weight", 0, INFINITE),
    ("objective.dropout", 0, 1),
    ("guard.stop_after", 1, INFINITE),
    ("guard.spike", 1e-12, INFINITE),
    ("evaluation.sources.*.limit", 1, INFINITE),
    ("evaluation.every", 0, INFINITE),
    ("output.save_every", 0, INFINITE),
    ("output.keep", 1, INFINITE),
    ("output.log_every", 1, INFINITE),
)


def _values(section: Any, pattern: str, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that ``pattern`` stands for, and its value."""
    name, _, rest = pattern.partition(".")
    items = enumerate(section) if name == "*" else [(name, getattr(section, name))]
    for word, value in items:
        key = f"{where}.{word}" if where else str(word)
        yield from _values(value, rest, key) if rest else [(key, value)]


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe ``name`` (a file, or a shipped one's name) and apply ``key.sub=value`` overrides."""
    values = _read(_find(str(name), Path()))
    for override in overrides:
        config_schema.override(values, override)
    return from_dict(values)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file over those of its base; ``above`` are the files that it is a base of."""
    if path.resolve() in above:
        names = " -> ".join(file.name for file in (*above, path))
        raise UserError(f"{path}: expected bases that come to an end, got {names}")
    values = config_schema.read(path)
    base = values.pop("base", None)
    if base is None:
        return values
    return config_schema.merge(_read(_find(str(base), path.parent), (*above, path.resolve())), values)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain dictionaries and lists."""
    return config_schema.build(Recipe, values)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _find(name: str, beside: Path) -> Path:
    for path in (beside / name, SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return path
    raise UserError(f"recipe: expected a file or one of {', '.join(shipped())}, got {name!r}")
