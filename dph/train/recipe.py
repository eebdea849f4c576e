"""Recipe: the configuration of one training stage, typed and frozen, read from YAML.

    base: sft                # a shipped recipe, or a file in the same folder; it may have a base of its own
    data:
      sources: [corpus.jsonl, {source: "task:glue/sst2", weight: 2}]
    optimiser:
      lr: 3e-5

``load("sft", ["optimiser.lr=1e-4", "data.sources=[corpus.jsonl]"])`` reads a shipped recipe or a file and applies
overrides, whose values are YAML. An unknown key or a value of the wrong type is a :class:`UserError` that names it.

Each option below has its default, its help, its range, and ``resume=True`` if a resumed run may change it;
``describe()`` returns all of them as text.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dph.errors import UserError, shown
from dph.train import config_schema, yaml_values
from dph.train.config_schema import REQUIRED, option, section

MAX_BASES = 32
SHIPPED = Path(__file__).parent / "recipes"
KINDS = {
    "pretrain": "text",
    "vocab": "conversation",
    "sft": "conversation",
    "align": "preference",
    "head": "preference",
}
POSITIVE = 1e-12  # minimum of an option that must be above zero
# Largest values that make sense, with the reason: a slip of the keyboard is refused before it takes the memory.
LENGTH = (2**24, "positions beyond are not exact in fp32")
BATCH = (2**20, "a step holds all of them in memory")
typed = dataclass(frozen=True, kw_only=True, slots=True)


@typed
class InitialModel:
    """Initial weights: those in ``path``, or fresh ones with the sizes in ``config``."""

    path: str | None = option(
        None,
        "model directory or hub name: our own format, a Llama, Mistral or Qwen, or a released lsw_transformer model",
    )
    config: dict[str, Any] | None = option(None, "arguments of dph.ModelConfig for fresh weights")
    tokenizer: str | None = option(None, "tokenizer directory or hub name; null: the one in path")
    embeddings: str | None = option(
        None,
        "model directory or hub name whose token embedding initialises fresh weights (the paper: facebook/opt-125m)",
    )


@typed
class Source:
    """One source of records; a bare text in YAML is short for its ``source``."""

    source: str = option(
        REQUIRED,
        "task:NAME (dph.tasks), hub:NAME[:CONFIG], a file (.jsonl, .json, .csv, .tsv, .txt, also with .gz, .bz2, .xz "
        "or .zst; .parquet, .arrow), a folder of such files, or one of save_to_disk",
    )
    split: str | None = option(None, "split of a task, a hub data set or a folder of save_to_disk")
    directory: str | None = option(
        None, "folder with local files of tasks, <task>/<split>.jsonl, used instead of the hub; null: the section's"
    )
    weight: float | Literal["size"] = option(
        1.0,
        "weight in the mixture, relative to the other sources; size: the number of the source's training records, so "
        "that each record of the mixture is equally likely (for all sources or for none)",
        minimum=0,
    )
    limit: int | None = option(None, "number of records to use, from the first one; null: all", minimum=1)
    text_field: str = option("text", "field with the plain text (stage pretrain)")
    columns: dict[str, Any] | None = option(
        None, "names of fields in the data, as {prompt: question, chosen: better}, by our names; null: the same"
    )
    filter: dict[str, Any] | None = option(
        None, "rows to use, by a field in the data and its value, or a list of values, as {lang: [en, de]}; null: all"
    )
    format: Literal["rendered"] | None = option(
        None,
        "rendered: the texts are whole conversations in the markup of a chat format (ChatML, Llama 2 and 3, Zephyr, "
        "Gemma, HH), which becomes messages; null: plain text or messages, and such markup is an error",
    )
    head: str | None = option(
        None,
        "reward head that learns from these records, one of objective.heads; null: all, or those that the labels of a "
        "record name (preference stages, dph.data.label_fields)",
    )


@typed
class Data:
    """Training records, how they are cut, and how they are loaded."""

    sources: tuple[Source, ...] = option((), "mixture of sources")
    directory: str | None = option(None, "folder with local files of tasks for all sources; null: the hub")
    consecutive: int = option(
        5,
        "consecutive samples from one source before another source is drawn (streams)",
        minimum=1,
        maximum=(2**16, "a stream holds all of them in memory"),
    )
    redraw: bool = option(
        True,
        "draw the wrong answer of a task's pair anew each time the record comes again; false: once for the whole run "
        "(preference stages)",
    )
    prefixes: float = option(
        0.0,
        "share of the records from which a further one is made, by cutting its answers after a random number of tokens "
        "and closing them with the end-of-turn token, with the final labels: for heads that prune answers while they "
        "are sampled. It takes a place in the batch; none is made for the last place (stages head, and align with "
        "objective.dpo_weight 0, as text is not to be learnt from cut answers)",
        minimum=0,
        below=1,
    )
    loss: Literal["answers", "all"] = option(
        "answers",
        "tokens of a conversation that are learnt: answers with their ends of turn, or all but the first token, also "
        "prompts and markup, except answers of weight 0; held-out metrics are over the same tokens (stages vocab, sft)",
    )
    repeat_system: bool = option(
        True,
        "each of the consecutive conversations of a stream begins anew; false: they are one conversation, with the "
        "system messages of the first alone, as in dph.chat.encode_many (stages vocab and sft)",
    )
    context: int = option(
        2048,
        "tokens of a segment of a stream; in preference stages the maximum length of an answer with its prompt, longer "
        "pairs are left out",
        minimum=1,
        maximum=LENGTH,
    )
    memory: int = option(2048, "tokens of Transformer-XL memory per stream; 0: no memory", minimum=0, maximum=LENGTH)
    memory_kind: Literal["kv", "hidden"] = option(
        "kv", "cached keys and values, or hidden states (recompute_kv of the released configuration)"
    )
    memory_place: Literal["auto", "device", "host"] = option(
        "auto",
        "storage of the memory: device, host (pinned, copied during computation), or auto: the device if the whole run "
        "fits (dph.train.budget.memory); changes no result",
        resume=True,
    )
    cache: str | None = option(
        None,
        "folder for outputs of frozen models on the data (dph.train.precompute.pairs); null: the folder cache next to "
        "the run directory, shared by runs in the same folder",
    )
    cache_states: bool = option(
        True,
        "stage head caches the frozen backbone's hidden states of judged tokens and runs the backbone once per pair: "
        "8 * hidden_size bytes per pair, 6 GB for the 491,520 pairs of the recipe paper-head, for one layer",
    )
    workers: int = option(
        0,
        "worker processes per rank that read and encode training records in advance; 0: the training process encodes "
        "them; changes no result",
        minimum=0,
        maximum=(256, "each is a process that takes a processor core"),
        resume=True,
    )


@typed
class Optimiser:
    """LaProp and its learning rate schedule."""

    lr: float = option(3e-5, "peak learning rate, reached linearly at step warmup", minimum=0)
    final_lr: float = option(0.0, "learning rate of the last step, reached by cosine decay", minimum=0)
    warmup: int = option(200, "warm-up steps", minimum=0)
    steps: int = option(6144, "total number of steps", minimum=1, maximum=(10**9, "a year at 32 ms a step"))
    betas: tuple[float, float] = option((0.9, 0.95), "coefficients of momentum and second moment", minimum=0, below=1)
    eps: float = option(1e-8, "term added to the square root of the second moment", minimum=0)
    weight_decay: float = option(0.0, "decay towards zero, multiplied by the learning rate", minimum=0)
    prior_decay: float = option(
        0.0, "decay towards the stage's initial weights, multiplied by the learning rate", minimum=0
    )
    head_weight_decay: float | None = option(
        None, "weight_decay of the reward heads and their poolers (preference stages); null: the same", minimum=0
    )
    head_prior_decay: float | None = option(
        None, "prior_decay of the reward heads and their poolers (preference stages); null: the same", minimum=0
    )
    no_decay: tuple[str, ...] = option(
        ("norm", "bias", "embedding"), "parameters whose name contains one of these words have no decay of any kind"
    )
    clip: float = option(1.0, "maximum of the gradient's global norm", minimum=POSITIVE)


@typed
class Lora:
    """Low-rank adapters on the linear layers of the blocks (LoRA, arXiv 2106.09685; stages pretrain, sft and align)."""

    rank: int | None = option(
        None,
        "rank r of the adapters: the weight W of a layer is used as W + alpha / r * B A, with A [r, inputs] and B "
        "[outputs, r]. Only A, B and the recipe's reward heads are trained. The reference model is the same weights "
        "without adapters. B begins as zero and A as random numbers: optimiser.prior_decay pulls B to zero, which "
        "is no adapter, and A to these numbers. The run's folder model has the adapters merged into the weights, its "
        "folder adapter has them alone, in PEFT's format, for dph.Model; adapter-hf for a family's own class. Needs "
        "PEFT; null: no adapters",
        minimum=1,
        maximum=(2**14, "such adapters have more weights than the layers"),
    )
    alpha: float | None = option(None, "numerator of the adapters' scale; null: twice the rank", minimum=POSITIVE)
    dropout: float = option(
        0.0,
        "dropout of the adapters' inputs, drawn per micro-batch: with dropout, batch.micro changes the result",
        minimum=0,
        below=1,
    )
    targets: tuple[Literal["qkv", "out", "fc1", "fc2"], ...] = option(
        ("qkv", "out", "fc1", "fc2"),
        "layers of a block with an adapter. Queries, keys and values are one layer (qkv) with one A for all three, and "
        "so are gate and up-projection (fc1)",
    )


@typed
class Trained:
    """Part of the model that is trained."""

    last_layers: int | None = option(
        None,
        "number of blocks, the last ones, that are trained, with the output norm and in stage align the recipe's "
        "reward heads; the embedding, the language-model head and the other blocks are frozen, and no activation of "
        "theirs is stored. With lora.rank, the blocks with adapters. null: all (stages pretrain, sft and align)",
        minimum=1,
        maximum=(1024, "no model has more blocks"),
    )
    frozen: tuple[str, ...] = option(
        (),
        "patterns of the names of parameters that stay as they are, with * and ? as in names of files, such as "
        "[backbone.embedding.*, '*.bias']; they have neither gradients nor optimizer state (not with lora.rank)",
    )


@typed
class Batch:
    """Batch and micro-batches; in stage head micro-batches are the backbone's, the heads judge all pairs at once."""

    size: int = option(128, "sequences (streams) or pairs per step", minimum=1, maximum=BATCH)
    micro: int | None = option(
        None,
        "sequences or pairs per micro-batch; null: the whole batch; changes the footprint, not the result",
        minimum=1,
        resume=True,
    )
    tokens: int | None = option(
        None,
        "tokens per micro-batch at most, instead of micro and for pairs only; prompts are shared, and the longest pair "
        "comes first; a pair with more tokens is left out",
        minimum=1,
        maximum=(2**31 - 1, "rows are counted in 32 bits"),
    )


@typed
class Objective:
    """Joint preference objective (stages align and head; arXiv 2405.20053, section 3)."""

    beta: float = option(0.6, "strength of cDPO's implicit reward", minimum=0)
    dpo_epsilon: float = option(0.25, "label smoothing of cDPO", minimum=0, below=0.5)
    dph_epsilon: float = option(0.1, "label smoothing of the reward loss", minimum=0, below=0.5)
    objective: Literal["separable", "contrastive"] = option("separable", "reward loss")
    dpo_weight: float = option(
        1.0, "weight of cDPO; 0 switches it off, together with the reference model; stage head ignores it", minimum=0
    )
    dpo_mean: bool = option(
        False,
        "cDPO compares mean log-probabilities of the answers' tokens, with their ends of turn, instead of sums; so of "
        "the reference, too",
    )
    dph_weight: float = option(1.0, "weight of the reward loss", minimum=0)
    heads: tuple[str, ...] = option(("default",), "names of the reward heads to train")
    pooler: Literal["identity", "bert", "t5", "swiglu_bert", "swiglu_t5"] | None = option(
        None, "pooler of new reward heads; null: the model's"
    )
    dropout: float | None = option(None, "dropout of the heads; null: the model's", minimum=0, below=1)
    layer: Literal["auto", "mix"] | int | tuple[int, ...] | None = option(
        None,
        "layer that new heads judge: the number of the block whose input it is, or -1 for the states after the output "
        "norm; a list: a learnt mix of several; mix: of five in the upper part of the model; auto: the best single one "
        "or that mix, by linear probes on a sample of the training pairs (dph.train.layer_choice); null: the model's",
    )
    standardised: bool | None = option(
        None, "whether new heads judge standardised states, by those of a sample of training answers; null: the model's"
    )
    ensemble: int | None = option(
        None,
        "reward vectors of each new head, whose mean is the reward; best-of-N can subtract their spread (rank "
        "lower_bound); each learns from a random half of the pairs of its own; null: the model's, by default 1",
        minimum=1,
        maximum=(64, "they share one pooler"),
    )
    sample: int = option(
        1000,
        "training pairs in the sample of layer auto and standardised",
        minimum=10,
        maximum=(2**20, "it is held in memory"),
    )
    reference: Literal["fly", "cache"] = option(
        "fly",
        "cDPO's reference log-probabilities: computed in every step (fly), or once per pair and stored in data.cache "
        "(cache, 40 bytes per pair); both give the same weights, bit for bit in the first epoch",
    )


@typed
class Guard:
    """Skipped steps: those that would harm the weights are counted, and the weights stay as they are."""

    stop_after: int = option(
        3,
        "consecutive skipped steps that end the run, with the weights from before the first of them; if streams have "
        "memory, a non-finite step also costs the next one, after which the memory is empty",
        minimum=1,
    )
    spike: float | None = option(
        None,
        "skip a step whose loss is more than this number of standard deviations above its running mean; null: skip "
        "only steps whose loss or gradient is not finite",
        minimum=POSITIVE,
    )


@typed
class Evaluation:
    """Held-out records."""

    sources: tuple[Source, ...] = option((), "sources of held-out records; none: no evaluation")
    directory: str | None = option(None, "folder with local files of tasks for all sources; null: the hub")
    every: int = option(0, "steps between evaluations; 0: only after the last step", minimum=0)
    share: float = option(
        0.0,
        "share of the prompts of the training sources that are kept for evaluation, as the source development, and not "
        "trained on (preference stages)",
        minimum=0,
        below=1,
    )
    patience: int | None = option(
        None, "evaluations in a row without a better output.best after which the run ends; null: it does not", minimum=1
    )


@typed
class Output:
    """Run directory, checkpoints and logging."""

    directory: str = option("runs/stage", "path of the run directory; the finished model is saved in its folder model")
    save_every: int = option(
        500, "steps between checkpoints; 0: only when the run ends, also by a signal or an error", minimum=0
    )
    keep: int = option(2, "number of checkpoints to keep", minimum=1)
    best: str | None = option(
        None,
        "name of a held-out metric (loss, reward_accuracy, reward_accuracy/glue/rte, ...): the best step by it is "
        "saved when it is evaluated, and its checkpoint is kept in addition (dph.train.best_checkpoint)",
    )
    model: Literal["last", "best"] = option("last", "step whose weights the finished model has; best: by output.best")
    log_every: int = option(10, "steps between lines of metrics.jsonl, which hold means over these steps", minimum=1)
    tracker: Literal["wandb", "trackio"] | None = option(
        None, "tracker that receives these lines in addition to TensorBoard (dph.train.trackers)"
    )
    project: str = option("dph", "project of the run at the tracker")


@typed
class Recipe:
    """One stage of training."""

    stage: Literal["pretrain", "vocab", "sft", "align", "head"] = option(
        REQUIRED, "pretrain, vocab (embedding only), sft, align (all weights and head) or head (head only)"
    )
    model: InitialModel = section(InitialModel)
    data: Data = section(Data)
    optimiser: Optimiser = section(Optimiser)
    train: Trained = section(Trained)
    lora: Lora = section(Lora)
    batch: Batch = section(Batch)
    objective: Objective = section(Objective)
    guard: Guard = section(Guard)
    evaluation: Evaluation = section(Evaluation, resume=True)
    output: Output = section(Output, resume=True)
    seed: int = option(0, "seed of fresh weights, order of data and dropout")
    checkpointing: Literal["none", "block"] = option(
        "none",
        "block: recompute the activations of blocks in the backward pass, which saves most of their footprint for a "
        "third more arithmetic; changes no result",
        resume=True,
    )
    compile: bool = option(
        False,
        "compile the parts of the blocks around attention (dph.train.compile); same results but for rounding. Needs a "
        "C++ compiler (on a GPU a C compiler and triton) and up to a minute at the start. Steps on one CPU core, in "
        "miniature, were 1.04 to 1.07 times as fast; on an H200 at the paper's size 0.95 times in sft, since our own "
        "kernels fuse as much, and no faster in align.",
        resume=True,
    )
    cuda_graph: bool = option(
        False,
        "record the step of the heads as a CUDA graph and replay it, which saves the kernel launches that take most of "
        "a step with cached states (stage head, one rank, on a GPU; dph.train.cuda_graph). Not yet timed on a GPU.",
        resume=True,
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "fp32, bf16 (with fp32 master weights), or auto: bf16 on a GPU, fp32 on a CPU"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ..., or auto: the GPU if there is one")
    parallel: Literal["shard", "replicate"] = option(
        "shard",
        "with torchrun (dph.train.distributed): each rank stores a shard of weights and optimizer state, or a replica, "
        "which needs more memory and less communication",
        resume=True,
    )

    def __post_init__(self) -> None:
        """Raise UserError if a value is outside its range or contradicts another."""
        config_schema.check_ranges(self)
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise UserError(f"device: expected auto, cpu, cuda or cuda:NUMBER, got {shown(self.device)}")
        if self.optimiser.warmup > self.optimiser.steps:
            raise UserError(
                f"optimiser.warmup: expected at most steps {self.optimiser.steps}, got {self.optimiser.warmup}"
            )
        if self.batch.micro and self.batch.size % self.batch.micro:
            raise UserError(f"batch.micro: expected a divisor of batch.size {self.batch.size}, got {self.batch.micro}")
        if self.cuda_graph and self.stage != "head":
            raise UserError(f"cuda_graph: expected false in stage {self.stage}, whose steps differ in shape, got true")
        for key, value in (("lora.rank", self.lora.rank), ("train.last_layers", self.train.last_layers)):
            if value is not None and self.stage in ("vocab", "head"):
                raise UserError(f"{key}: expected null in stage {self.stage}, got {value}")
        if self.lora.rank is not None and self.train.frozen:
            raise UserError(f"train.frozen: expected none with lora.rank, got {shown(', '.join(self.train.frozen))}")
        if self.lora.rank is not None and self.compile:
            raise UserError(f"compile: expected false with lora.rank {self.lora.rank}, got true")
        if not self.lora.targets:
            raise UserError("lora.targets: expected at least one of qkv, out, fc1, fc2, got none")
        if self.evaluation.share and self.kind != "preference":
            raise UserError(f"evaluation.share: expected 0 in stage {self.stage}, got {self.evaluation.share}")
        for key, value in (("evaluation.patience", self.evaluation.patience), ("output.model", self.output.model)):
            if value not in (None, "last") and self.output.best is None:
                raise UserError(f"output.best: expected the metric that {key} {value} goes by, got null")
        for name, sources in (("data", self.data.sources), ("evaluation", self.evaluation.sources)):
            for i, source in enumerate(sources):
                if source.head is not None and (self.kind != "preference" or source.head not in self.objective.heads):
                    heads = ", ".join(self.objective.heads) if self.kind == "preference" else "null"
                    raise UserError(f"{name}.sources.{i}.head: expected one of {heads}, got {shown(source.head)}")
        by_size = [source.weight == "size" for source in self.data.sources]
        if any(by_size) and not all(by_size):
            number = by_size.index(False)
            got = f"{self.data.sources[number].weight:g}, and size for data.sources.{by_size.index(True)}"
            raise UserError(f"data.sources.{number}.weight: expected size for all sources or for none, got {got}")
        self._check_stage_options()
        if self.output.best is not None and not self.evaluation.every:
            raise UserError(f"evaluation.every: expected at least 1 with output.best {self.output.best}, got 0")
        if self.batch.tokens is not None and (self.batch.micro or self.kind != "preference"):
            reason = f"with batch.micro {self.batch.micro}" if self.batch.micro else f"in stage {self.stage}"
            raise UserError(f"batch.tokens: expected none {reason}, got {self.batch.tokens}")

    def _check_stage_options(self) -> None:
        """Raise UserError for an option that the stage would not use."""
        if self.kind != "preference":
            for name in ("head_weight_decay", "head_prior_decay"):
                if (value := getattr(self.optimiser, name)) is not None:
                    raise UserError(f"optimiser.{name}: expected null in stage {self.stage}, got {value}")
        if self.objective.dpo_mean and (self.stage != "align" or not self.objective.dpo_weight):
            reason = f"in stage {self.stage}" if self.stage != "align" else "with objective.dpo_weight 0"
            raise UserError(f"objective.dpo_mean: expected false {reason}, got true")
        learns_text = self.stage == "align" and self.objective.dpo_weight > 0
        if self.data.prefixes and (learns_text or self.kind != "preference"):
            reason = f"with objective.dpo_weight {self.objective.dpo_weight:g}" if learns_text else "without a head"
            raise UserError(f"data.prefixes: expected 0 in stage {self.stage} {reason}, got {self.data.prefixes:g}")
        if self.data.loss == "all" and self.kind == "preference":
            raise UserError(f"data.loss: expected answers in stage {self.stage}, got all")
        if not self.data.repeat_system and self.kind != "conversation":
            raise UserError(f"data.repeat_system: expected true in stage {self.stage}, got false")

    @property
    def kind(self) -> str:
        """Kind of the stage's records: text, conversation or preference."""
        return KINDS[self.stage]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists, as in JSON; ``from_dict`` reads them."""
        return config_schema.plain(dataclasses.asdict(self))


MAY_CHANGE_ON_RESUME = config_schema.may_change_on_resume(Recipe)
"""Dotted keys of options and whole sections."""


BEFORE = {"data.redraw": False}
"""Options of later versions -> value in the runs that began before them, if it is not the default."""


def describe() -> str:
    """Return a text with type, default, range and help of all options."""
    return config_schema.describe(Recipe)


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe ``name`` (a file, or the name of a shipped one) and apply ``key.sub=value`` overrides."""
    values = _read(_find(str(name), Path()))
    for override in overrides:
        yaml_values.override(values, override)
    return from_dict(values)


def _read(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file merged over those of its base; ``derived`` are the files based on this one."""
    if path.resolve() in derived:
        names = " -> ".join(file.name for file in (*derived, path))
        raise UserError(f"{path}: expected no circular base, got {names}")
    values = yaml_values.read(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of a recipe, got {shown(base)}")
    if len(derived) == MAX_BASES:
        raise UserError(f"{path}: base: expected at most {MAX_BASES} recipes based on each other, got more")
    return yaml_values.merge(_read(_find(base, path.parent), (*derived, path.resolve())), values)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain dictionaries and lists."""
    return config_schema.build(Recipe, values)


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _find(name: str, folder: Path) -> Path:
    """Return the path of the file ``name`` in ``folder``, or else of the shipped recipe of that name."""
    for path in (folder / name, SHIPPED / f"{name}.yaml"):
        with contextlib.suppress(OSError):  # a name that is too long, or a folder that may not be read
            if path.is_file():
                return path
    raise UserError(f"recipe: expected a file or one of {', '.join(shipped())}, got {shown(name)}")
