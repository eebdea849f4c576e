"""Frozen causal language model of transformers with the interface of our backbone: packed rows in, states out.

A packed layout becomes padded batches of similar lengths. Prompts are padded on the left and computed once, into the
model's own cache; their branches follow with copies of it, padded on the right. So the tokens of a row are adjacent,
which sliding windows need, and positions are explicit. A network without such a cache (recurrent ones) computes each
conversation whole, in batches without padding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from dph.errors import UserError, one_line
from dph_kernels.layout import PackedLayout

Observer = Callable[[int, Tensor], None]

TOKENS = 8192  # of a padded batch, those in its cache included; a longer conversation is a batch alone
SLACK = 32  # tokens of padding in a row that are not worth another batch
PROBE = 12  # tokens of a row with which a network is tried out
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative, of trying out; 0.05 in lower precision
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)  # of the call in this thread


class AttachedBackbone(nn.Module):
    """Tokens [T] to hidden states [T, C] by a frozen network, as ``dph.model.backbone.Backbone``.

    The network stays in evaluation mode. Its floating-point buffers that files hold become frozen parameters, so that
    digests and checkpoints include them.

    Args:
        network: causal language model of transformers, with its language-model head.
        shares_prompts: compute prompts once, into the network's cache, and pad batches.

    Raises UserError if the network's blocks are not found.
    """

    gradient_checkpointing = False  # set by the trainer; nothing is saved for a backward pass

    def __init__(self, network: PreTrainedModel, shares_prompts: bool = True) -> None:
        super().__init__()
        self.network, self.shares_prompts = network.requires_grad_(False).eval(), shares_prompts
        _freeze_buffers(network)
        self._blocks = _blocks_path(network)
        self._body = _body_path(network, self._blocks)
        accepted = inspect.signature(self.body.forward).parameters
        self.accepts = {name for name in ("attention_mask", "position_ids", "use_cache") if name in accepted}
        self.has_projection = getattr(self.body, "project_out", None) is not None  # OPT's, from C to E
        watched = [*self.blocks, self.body.project_out] if self.has_projection else self.blocks
        for number, module in enumerate(watched):
            hooks = module._forward_pre_hooks.values()
            if not any(isinstance(hook, partial) and hook.func is _observe for hook in hooks):  # of another model
                module.register_forward_pre_hook(partial(_observe, number), with_kwargs=True)

    @property
    def body(self) -> nn.Module:
        """The network without its language-model head."""
        return self.network.get_submodule(self._body)

    @property
    def blocks(self) -> nn.ModuleList:
        """The network's blocks."""
        return self.network.get_submodule(self._blocks)

    @property
    def embedding(self) -> nn.Module:
        """The network's token embedding."""
        return self.network.get_input_embeddings()

    def train(self, mode: bool = True) -> AttachedBackbone:
        """Stay in evaluation mode: a frozen network has no dropout."""
        return super().train(False)

    def forward(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        memory: Any = None,
        observe: Observer | None = None,
        blocks: int | None = None,
        states: None = None,
    ) -> Tensor:
        """Tokens [T] int64 -> [T, C]: after the final norm, or the input of block ``blocks``, after which it stops.

        Args:
            tokens, layout: rows and their layout, of shared beginnings and branches.
            memory, states: have to be None.
            observe: called with numbers of blocks and their inputs [T, C], and with the number of blocks and the
                result; with ``layers`` (``JudgedStates``) only for these.
            blocks: number of blocks to compute; None for all.

        Raises ValueError for a memory, a layout of another kind, and conversations longer than the network's context.
        """
        if memory is not None:
            raise ValueError("memory: expected none with a network of transformers, got one")
        documents, last = _documents(layout), len(self.blocks) if blocks is None else blocks
        longest = max((document.length for document in documents), default=0)
        if self.context is not None and longest > self.context:
            expected = f"conversations of at most {self.context} (config.max_position_embeddings)"
            raise ValueError(f"tokens: expected {expected}, got {longest}")
        layers = getattr(observe, "layers", None)
        wanted = {last}
        if layers is not None:
            wanted |= {layer for layer in layers if layer >= 0}
        elif observe is not None:
            wanted |= set(range(last))
        rows = _Rows(tokens, wanted, stop=blocks, last=len(self.blocks))
        shares = self.shares_prompts and last > 0  # without a block there is nothing to store
        alone, shared = [], []
        for document in documents:
            if document.branches and shares:
                shared.append(document)
            else:
                alone += document.sequences()
        for group in _groups([len(sequence.rows) for sequence in alone], equal=not self.shares_prompts):
            self._compute(rows, [alone[i] for i in group])
        for group in _groups([document.end - document.start for document in shared]):
            self._compute_shared(rows, [shared[i] for i in group])
        for number in sorted(rows.states) if observe is not None else ():
            observe(number, rows.states[number])
        return rows.states[last] if last in rows.states else self.embedding.weight.new_zeros(len(tokens), self.width)

    @property
    def width(self) -> int:
        """C, the width of the blocks."""
        return self.network.config.hidden_size

    @property
    def context(self) -> int | None:
        """Most tokens of a conversation; None for any number."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def project(self, states: Tensor) -> Tensor:
        """[.., C] after the final norm -> [.., E] that the language-model head multiplies."""
        return self.body.project_out(states) if self.has_projection else states

    def logits(self, states: Tensor) -> Tensor:
        """Logits [R, V] of states [R, E], by the network's own code, with its biases, scales and caps.

        A copy of the network, made of the same modules, gets the states in place of those that its body computes.
        """
        parent = readout = _copy(self.network)
        for name in self._body.split("."):
            parent._modules[name] = parent = _copy(parent._modules[name])
            parent.forward = _given_states
        return readout(inputs_embeds=states[None], use_cache=False).logits[0]

    def continued(self, ids: Tensor, mask: Tensor, copies: int) -> Callable[[Tensor], Tensor]:
        """Read prompts [B, S], padded on the left, but for their last tokens; return a function that continues them.

        The function takes the next tokens [B * copies, 1] and returns their states [B * copies, E].
        """
        if not self.shares_prompts:
            return self._recomputed(ids, mask, copies)
        cache = DynamicCache()
        if ids.shape[1] > 1:
            self._run(ids[:, :-1], mask[:, :-1], cache=cache)
            cache.batch_repeat_interleave(copies)
        seen = mask[:, :-1].repeat_interleave(copies, 0)

        def advance(tokens: Tensor) -> Tensor:
            nonlocal seen
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            return self._run(tokens, seen, cache=cache)[:, -1]

        return advance

    def _recomputed(self, ids: Tensor, mask: Tensor, copies: int) -> Callable[[Tensor], Tensor]:
        """As ``continued``, computing whole conversations for each token."""
        rows = [row[kept.bool()][:-1] for row, kept in zip(ids, mask, strict=True) for _ in range(copies)]

        def advance(tokens: Tensor) -> Tensor:
            for i, token in enumerate(tokens):
                rows[i] = torch.cat([rows[i], token])
            lengths = list(map(len, rows))
            states = self(torch.cat(rows), PackedLayout.documents(lengths))
            return self.project(states[torch.tensor(lengths, device=states.device).cumsum(0) - 1])

        return advance

    # Padded batches

    def _compute(self, rows: _Rows, sequences: Sequence[_Sequence]) -> None:
        """Compute whole sequences, padded on the right."""
        batch = _Padded([sequence.rows for sequence in sequences])
        ids = rows.read(batch, [sequence.known for sequence in sequences])
        with _observed(rows):
            rows.finish(self._run(ids, batch.mask_on(ids.device)))

    def _compute_shared(self, rows: _Rows, documents: Sequence[_Document]) -> None:
        """Compute shared beginnings, padded on the left, and with their cache all branches."""
        batch = _Padded([np.arange(document.start, document.end) for document in documents], left=True)
        ids, cache = rows.read(batch), DynamicCache()
        prompt_mask, width = batch.mask_on(ids.device), batch.mask.shape[1]
        with _observed(rows):
            rows.finish(self._run(ids, prompt_mask, cache=cache))
        if cache.get_seq_length() != width:
            raise RuntimeError(f"cache: expected {width} tokens, got {cache.get_seq_length()}")
        branches = []
        for number, document in enumerate(documents):
            branches += [(number, branch) for branch in document.branches]
        for group in _groups([end - start for _, (start, end) in branches], before=width):
            numbers = torch.tensor([branches[i][0] for i in group], device=ids.device)
            batch = _Padded([np.arange(*branches[i][1]) for i in group])
            ids = rows.read(batch)
            seen = torch.cat([prompt_mask[numbers], batch.mask_on(ids.device)], 1)
            with _observed(rows):
                rows.finish(self._run(ids, seen, cache=_selected(cache, numbers)))

    def _run(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor | None:
        """Return the body's states [B, S, E] of tokens [B, S]; None if it stopped before.

        Args:
            ids: new tokens.
            mask: [B, P + S], 0 for padding, of the P columns in the cache and the new ones.
            cache: read and extended.
        """
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)[:, -ids.shape[1] :]
        options = {"attention_mask": mask, "position_ids": positions, "use_cache": cache is not None}
        options = {name: value for name, value in options.items() if name in self.accepts}
        if cache is not None:
            options["past_key_values"] = cache
        try:
            return self.body(input_ids=ids, **options)[0]
        except _Stopped:
            return None

    # Trying out

    @torch.no_grad()
    def try_out(self) -> None:
        """Decide by two short rows of tokens whether prompts can be shared (``shares_prompts``).

        Raises UserError if a token's logits depend on later tokens, or do not follow from the states of the body.
        """
        network, config = self.network, self.network.config
        kind, vocabulary = config.model_type, self.embedding.weight.shape[0]
        length = PROBE if self.context is None else min(PROBE, self.context)
        shared, short = length // 2, max(length // 4, 1)
        row = torch.arange(length, device=network.device)
        ids = (5 + torch.stack([row, torch.where(row < shared, row, 7 * row)])) % vocabulary  # 0 to 4 may be padding
        try:
            logits = network(input_ids=ids, use_cache=False).logits
            self.shares_prompts = False
            states = self(ids.flatten(), PackedLayout.documents([length, length]))
            own = self.logits(self.project(states)).view_as(logits)
        except Exception as error:  # of any kind: another network than is expected
            got = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{kind}: expected a causal language model of transformers, got one with {got}") from error
        if shared < length - 1 and not _close(logits[0, :shared], logits[1, :shared]):
            raise UserError(f"{kind}: expected a causal language model, got one whose tokens attend to later ones")
        if not _close(own, logits):
            expected = "logits that follow from the states of its last block, with positions from 0"
            raise UserError(f"{kind}: expected {expected}, got others")
        if not _has_plain_cache(network):
            return
        packed = torch.cat([ids[0], ids[1, shared:], ids[0]])
        expected = torch.cat([states[:length], states[length + shared :], states[:length]])
        layout = PackedLayout.shared_prefix([shared, short], [[length - shared] * 2, [length - short]])
        self.shares_prompts = True
        try:
            self.shares_prompts = _close(self(packed, layout), expected)
        except Exception:  # of any kind: a cache of its own
            self.shares_prompts = False


class _Document(NamedTuple):
    """Rows of a shared beginning, and of its branches that are not empty."""

    start: int
    end: int
    branches: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Number of tokens of the longest conversation."""
        return self.end - self.start + max((end - start for start, end in self.branches), default=0)

    def sequences(self) -> list[_Sequence]:
        """Return whole conversations; all but the first have a beginning whose states are known."""
        beginning, known, sequences = np.arange(self.start, self.end), 0, []
        for branch in self.branches or [(self.end, self.end)]:
            sequences.append(_Sequence(np.concatenate([beginning, np.arange(*branch)]), known))
            known = len(beginning)
        return [sequence for sequence in sequences if len(sequence.rows)]


class _Sequence(NamedTuple):
    """Rows of a whole conversation, and how many of the first are another sequence's, too."""

    rows: np.ndarray
    known: int


class _Padded:
    """Rows [B, ..] of a packed batch as a padded batch, with its mask [B, S]."""

    def __init__(self, rows: Sequence[np.ndarray], left: bool = False) -> None:
        lengths = np.array([len(row) for row in rows])
        columns = np.arange(lengths.max())
        real = columns >= lengths.max() - lengths[:, None] if left else columns < lengths[:, None]
        self.mask, self.rows = real, np.concatenate(rows)

    def mask_on(self, device: torch.device) -> Tensor:
        """Return the mask as int64, as transformers takes it."""
        return torch.from_numpy(self.mask).to(device, torch.int64)


class _Rows:
    """States [T, C] of packed rows, by block, gathered from padded batches.

    Args:
        tokens: [T].
        wanted: numbers of blocks whose inputs are kept.
        stop: number of the block at whose input a call ends; None for none.
        last: number of blocks, which is that of the result.
    """

    def __init__(self, tokens: Tensor, wanted: set[int], stop: int | None, last: int) -> None:
        self.tokens, self.wanted, self.stop, self.last = tokens, wanted, stop, last
        self.states: dict[int, Tensor] = {}
        self._observed: set[int] = set()

    def read(self, batch: _Padded, known: Sequence[int] = ()) -> Tensor:
        """Return the tokens [B, S] of the next call, in which padding is token 0.

        Of each sequence, the states of the first ``known`` [B] tokens are not kept.
        """
        device, ids, places = self.tokens.device, self.tokens.new_zeros(batch.mask.shape), np.flatnonzero(batch.mask)
        rows = torch.from_numpy(batch.rows).to(device)
        ids.view(-1)[torch.from_numpy(places).to(device)] = self.tokens[rows]
        new = slice(None)
        if any(known):
            new = (np.arange(batch.mask.shape[1]) >= np.array(known)[:, None])[batch.mask]
        self._rows = torch.from_numpy(batch.rows[new]).to(device)
        self._places = torch.from_numpy(places[new]).to(device)
        self._observed.clear()
        return ids

    def __call__(self, number: int, hidden: Tensor) -> None:
        """Keep the inputs [B, S, C] of a block; end the call at block ``stop``."""
        self._observed.add(number)
        if number in self.wanted:
            self._keep(number, hidden)
        if number == self.stop:
            raise _Stopped

    def finish(self, hidden: Tensor | None) -> None:
        """Keep the result [B, S, C] of a call, unless it ended before or its input of ``project_out`` was kept."""
        if hidden is not None and self.last in self.wanted and self.last not in self._observed:
            self._keep(self.last, hidden)

    def _keep(self, number: int, hidden: Tensor) -> None:
        if number not in self.states:
            self.states[number] = hidden.new_zeros(len(self.tokens), hidden.shape[-1])
        self.states[number][self._rows] = hidden.flatten(0, 1)[self._places]


class _Stopped(BaseException):
    """Ends a call of the network after the last block that is needed; no handler of errors catches it."""


@dataclass
class _Output(BaseModelOutputWithPast):
    """Output of a body with the last hidden state alone; all else is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _given_states(*_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
    """In place of a body's forward: return the states [B, S, E] that it gets as embeddings."""
    return _Output(last_hidden_state=inputs_embeds)


@contextlib.contextmanager
def _observed(observer: Observer) -> Iterator[None]:
    """Context in which this thread's calls of a network are observed."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _observe(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a block: pass its input on to the observer of the call, if there is one."""
    observer = _observer.get()
    if observer is not None:
        observer(number, args[0] if args else kwargs["hidden_states"])


def _freeze_buffers(network: nn.Module) -> None:
    """Turn floating-point buffers that are saved into frozen parameters of the same names."""
    for module in network.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _blocks_path(network: PreTrainedModel) -> str:
    """Return the name of the outermost list of as many modules as the network has blocks."""
    count = getattr(network.config, "num_hidden_layers", None)
    paths = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and "." in name:
            paths.append(name)
    if not paths:
        kind = network.config.model_type
        raise UserError(f"{kind}: expected a model with a list of num_hidden_layers = {count} blocks, got none")
    return min(paths, key=lambda name: name.count("."))


def _body_path(network: PreTrainedModel, blocks: str) -> str:
    """Return the name of the innermost module around the blocks that takes tokens."""
    path = blocks.rpartition(".")[0]
    while "." in path and "input_ids" not in inspect.signature(network.get_submodule(path).forward).parameters:
        path = path.rpartition(".")[0]
    return path


def _documents(layout: PackedLayout) -> list[_Document]:
    """Return the shared beginnings of a layout, each with its branches.

    Raises ValueError for a layout with memory, or with segments that see other keys.
    """
    documents: dict[int, _Document] = {}
    table = layout.segments.tolist()
    for number, (q0, q1, k0, k1, p0, p1, position) in enumerate(table):
        if layout.memory or (q0, q1) != (k0, k1) or position != p1 - p0 or (p0 != p1 and p0 not in documents):
            raise ValueError(f"segment {number}: expected a beginning or a branch of one, got {table[number]}")
        if p0 != p1 and documents[p0].end != p1:
            raise ValueError(f"segment {number}: expected a whole beginning as its prefix, got {table[number]}")
        if q0 == q1:
            continue
        if p0 == p1:
            documents[q0] = _Document(q0, q1, [])
        else:
            documents[p0].branches.append((q0, q1))
    return list(documents.values())


def _groups(lengths: Sequence[int], equal: bool = False, before: int = 0) -> Iterator[list[int]]:
    """Yield groups of similar lengths, by index, longest first.

    Args:
        lengths: in tokens.
        equal: groups of one length.
        before: tokens of each in a cache.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else lengths[i]
        slack = 0 if equal else max(SLACK, longest // 4)
        if group and (longest - lengths[i] > slack or (len(group) + 1) * (before + longest) > TOKENS):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _selected(cache: DynamicCache, numbers: Tensor) -> DynamicCache:
    """Return a cache of the rows ``numbers`` [B]."""
    content = []
    for layer in cache.layers:
        filled = layer.is_initialized
        content.append((layer.keys[numbers], layer.values[numbers]) if filled else (None, None))
    return DynamicCache(content)


def _has_plain_cache(network: PreTrainedModel) -> bool:
    """Whether the network stores keys and values of all tokens, or of a window of the last ones, and nothing else."""
    if getattr(network, "_is_stateful", False):
        return False
    layers = DynamicCache(config=network.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _copy(module: nn.Module) -> Any:
    """Return a copy of a module whose children can be replaced; parameters and children are the same."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return copied


def _close(values: Tensor, expected: Tensor) -> bool:
    """Whether values are equal but for rounding."""
    tolerance = TOLERANCE.get(expected.dtype, 0.05)
    difference, size = (values - expected).abs().max(), expected.abs().max()
    return bool(difference <= tolerance * size)
