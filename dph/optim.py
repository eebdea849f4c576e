"""LaProp with decoupled prior regularisation, the gradient norm, parameter groups and the learning-rate schedule."""

import copy
import math
import numbers
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dph_kernels
from dph._optim_checks import (
    CLOCK,
    PRIOR_DTYPES,
    check_grad_scale,
    check_params,
    check_settings,
    compare_groups,
    convert_settings,
    misfit_error,
    prior_dtype_name,
    saved_groups,
    sharding,
    with_name,
)
from dph.errors import shown
from dph_kernels import GradientNorm, checks

__all__ = ["LaProp", "gradient_norm", "param_groups", "warmup_cosine"]

NO_DECAY = ("norm", "bias", "embedding")
FLOAT = frozenset((float,))
_version = operator.attrgetter("_version")
CAST, EXCHANGED = "cast", "exchanged"  # a parameter since its state was made


class _Source(NamedTuple):
    """Storage of a parameter when its master and prior were copied from it.

    Attributes:
        version: count of changes in place.
        address: of the first element.
        is_prior: whether the prior has the values of that moment.
    """

    version: int
    address: int
    is_prior: bool

    @classmethod
    def read(cls, p: Tensor, is_prior: bool) -> "_Source":
        """Return the present storage of ``p``."""
        shard = local_shard(p)
        return cls(shard._version, shard.data_ptr(), is_prior)


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., arXiv 2002.04839) as the DPH paper uses it, with decay towards the starting weights.

    Per parameter θ with gradient g, prior θ₀ (its value when the optimizer is built), rate η, step t from 1::

        v ← β₂ v + (1 − β₂) g²
        m ← β₁ m + (1 − β₁) η · g / (√v + eps) · √(1 − β₂ᵗ)
        a ← β₁ a + (1 − β₁) η                     one scalar per group; c = a / η, and c = 1 if η = 0
        θ ← θ − λ_p η (θ − θ₀) − λ_w η θ − m / c

    The momentum m includes the rate, so a changing schedule weights each gradient by the rate at its step. A parameter
    without a gradient does not change. State is fp32; a bf16 or fp16 parameter has an fp32 master in the state, from
    which the operator writes the parameter. θ₀ is stored only if ``prior_decay`` is not 0; it is part of
    ``state_dict``, and loading a state without it raises: the anchor never moves silently.

    ``params`` are parameters, pairs of name and parameter (``model.named_parameters()``) or groups of either
    (``param_groups``); a group may override lr, betas, eps, both decays and ``prior_dtype``. If optimizer and state
    have the parameters' names, ``load_state_dict`` compares them.

    ``prior_dtype=torch.bfloat16`` rounds θ₀, which saves two bytes per parameter and 1/16 of the traffic. The anchor is
    then off by up to δ = 2⁻⁸ |θ₀| (0.4%), once and for all: after n steps a weight is off by δ (1 − (1 − λ_p η)ⁿ),
    never by more than δ. Weights that are bf16 numbers to begin with lose nothing.

    t and a are counted on the device and advance with the update itself: a step that ``grad_scale`` skips leaves both
    unchanged. A CUDA graph can capture ``step``: give lr as a tensor on the device and change it in place. Parameters
    that FSDP2 has sharded are updated shard by shard.

    Load the model's weights before the optimizer is built: the first step warns if the source of a prior has changed
    since. Until then parameters may be cast, moved, or exchanged for others (accelerate does so for FSDP2), and the
    state follows; a later step refuses them. Values that are written into a bf16 or fp16 parameter between two steps
    replace those of its master, unless they are written through ``.data``.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        prior_decay: float = 0.0,
        prior_dtype: torch.dtype | str = torch.float32,
    ) -> None:
        """Allocate the state and copy the priors.

        Raises:
            TypeError: a setting is no number, or a parameter is not floating-point.
            ValueError: a rate, eps or decay is negative, infinite or NaN; a beta is outside [0, 1); the priors are in
                neither fp32 nor bf16; a parameter is not contiguous, or there twice.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "prior_decay": prior_decay,
            "prior_dtype": prior_dtype_name(prior_dtype),
        }
        check_settings(defaults)
        self._clocks: list[Tensor] = []  # of each group: [t, a], fp64, on its device
        self._sources: dict[Tensor, _Source] = {}  # what the next step compares with the parameters
        self._leads: dict[int, int] = {}  # by a parameter's id: number of versions that it is ahead of its master
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that copies and pickles contain."""
        return {**super().__getstate__(), "_clocks": self._clocks, "_sources": self._sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, whose tensors have other addresses and versions."""
        super().__setstate__(state)
        self.__dict__.setdefault("_sources", {})  # older pickles
        self._leads = {}
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            group["prior_dtype"] = prior_dtype_name(group["prior_dtype"])
            self._show_clock(group, clock)
            for p in group["params"]:
                if "master" in self.state[p]:
                    self._set_master(p, self.state[p]["master"])

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, whose state and priors begin with its current values. Raises as the constructor."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            prefix = f"param_groups[{len(self.param_groups) - 1}]: "
            convert_settings(group, prefix)
            check_params(group, prefix)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._clocks.append(torch.zeros(2, dtype=torch.float64, device=_clock_device(group)))
        for p in group["params"]:
            self._create_state(p, group)
        self._show_clock(group, self._clocks[-1])

    # State of a parameter

    def _create_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Set moments to zero, and copy master and prior from the parameter."""
        state_dtype = _state_dtype(p)
        self.state[p] = state = {
            "step": None,  # see _show_clock
            "exp_avg": torch.zeros_like(p, dtype=state_dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, dtype=state_dtype, requires_grad=False),
        }
        if p.dtype != state_dtype:
            self._set_master(p, p.detach().to(state_dtype))
        if group["prior_decay"] != 0:
            prior_dtype = state_dtype if group["prior_dtype"] == "float32" else PRIOR_DTYPES[group["prior_dtype"]]
            state["prior"] = p.detach().to(prior_dtype, copy=True)
        self._sources[p] = _Source.read(p, is_prior=True)

    def _show_clock(self, group: dict[str, Any], clock: Tensor) -> None:
        """Put t and a, as views of the clock, where PyTorch's distributed checkpoints look for the names of a state."""
        step, group["rate_average"] = clock.unbind()
        for p in group["params"]:
            self.state[p]["step"] = step

    def _set_master(self, p: Tensor, master: Tensor) -> None:
        """Set the master of a parameter that has the same values.

        A step increments the version counters of both; only a change from elsewhere lets them drift apart.
        """
        self.state[p]["master"] = master
        self._leads[id(p)] = _lead(p, master)

    def _update_master(self, p: Tensor) -> None:
        """Copy the elements that were written into the parameter since the last step to its master.

        The other elements of the master keep their precision. Does not wait for the device.
        """
        master = self.state[p]["master"]
        weight, wide = local_shard(p), local_shard(master)
        present = wide.to(weight.device)
        wide.copy_(torch.where(weight != present.to(weight.dtype), weight.to(wide.dtype), present))
        self._set_master(p, master)

    @torch.no_grad()
    def _update_masters(self) -> None:
        """Copy what was written into parameters since the last step to their masters."""
        for p in self._params():
            master = self.state[p].get("master")
            if master is not None and _lead(p, master) != self._leads.get(id(p)):
                self._update_master(p)

    def _adapted(self, p: Tensor, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of a state in the dtypes and on the device that the parameter needs."""
        state_dtype = _state_dtype(p)
        state = {}
        for key, value in entries.items():
            is_rounded_prior = key == "prior" and value.dtype == torch.bfloat16
            if key not in CLOCK and (key != "master" or p.dtype != state_dtype):
                state[key] = value.detach().to(p.device, value.dtype if is_rounded_prior else state_dtype, copy=True)
        if p.dtype != state_dtype and "master" not in state:
            state["master"] = p.detach().to(state_dtype)
        return state

    # Parameters that change between the constructor and the first step

    @torch.no_grad()
    def _fit_state(self) -> None:
        """Before the first step, let the state follow parameters that were cast, moved or exchanged.

        The prior of one that was cast or moved stays. An exchanged one begins with its current value as the prior: the
        original may be gone, or empty on this rank.
        """
        if not self._sources:
            return
        for number, group in enumerate(self.param_groups):
            clock = self._clocks[number]
            for p in group["params"]:
                misfit = _misfit(p, self.state[p])
                if misfit == CAST:
                    self.state[p] = self._adapted(p, self.state[p])
                    if "master" in self.state[p]:
                        self._set_master(p, self.state[p]["master"])
                elif misfit == EXCHANGED:
                    if clock[0] > 0:
                        self._raise_misfit(group)
                    self._create_state(p, group)
            self._clocks[number] = clock.to(_clock_device(group))
            self._show_clock(group, self._clocks[number])
        present = set(self._params())
        for former in self.state.keys() - present:
            del self.state[former]
            self._sources.pop(former, None)

    def _check_sources(self) -> str | None:
        """Before the first step, compare parameters with the masters and priors that were copied from them.

        A master follows its parameter; a prior stays, and the result is a warning of it.
        """
        self._fit_state()
        params, changed = self._params(), []
        for p in params:
            source, state = self._sources.get(p), self.state[p]
            if source is None or source == _Source.read(p, source.is_prior):
                continue
            if "master" in state:
                self._update_master(p)
            if source.is_prior and "prior" in state and not _same_values(state["prior"], p):
                changed.append(p)
        self._sources = {}
        if not changed:
            return None
        return (
            f"{len(changed)} of {len(params)} parameters changed between the building of the optimizer and its first "
            f"step, first {self._place(changed[0])}; prior_decay pulls them back to the values from before. Load the "
            "model's weights first, then build the optimizer"
        )

    def _place(self, p: Tensor) -> str:
        """Return the place of a parameter for a message, and its name if it is known."""
        for number, group in enumerate(self.param_groups):
            for i, own in enumerate(group["params"]):
                if own is p:
                    return with_name(f"param_groups[{number}]: params[{i}]", group, i)
        raise KeyError(p)

    def _raise_misfit(self, group: dict[str, Any]) -> None:
        """Raise ValueError if parameters of a group were exchanged, cast or moved, or if a gradient is sparse."""
        for p in group["params"]:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"{self._place(p)}: expected a dense gradient, got one in {p.grad.layout}")
            state = self.state.get(p, {})
            if misfit := _misfit(p, state):
                raise misfit_error(self._place(p), p, state, is_known=misfit == CAST)

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        ``grad_scale``, one fp32 element on the same device, multiplies every gradient as it is read; if it is not
        finite, nothing changes at all (``gradient_norm`` returns NaN for gradients that are not finite).

        Raises:
            TypeError: ``closure`` is no function, or ``grad_scale`` or a setting of a group has the wrong type.
            ValueError: a setting of a group is out of range; a gradient is sparse; a parameter was exchanged, cast or
                moved after the first step; a tensor of the wrong shape, dtype or device.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure: expected a function without arguments, got {type(closure).__name__}")
            with torch.enable_grad():
                loss = closure()
        if grad_scale is not None and type(grad_scale) is not Tensor:
            check_grad_scale(grad_scale)
        for number, group in enumerate(self.param_groups):
            if not _settings_fit(group):
                check_settings(group, f"param_groups[{number}]: ", read_rate=False)
        if self._sources and (warning := self._check_sources()):
            _warn(warning)
        has_gradients = False
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            try:
                has_gradients |= self._step_group(group, clock, grad_scale)
            except (AttributeError, KeyError, RuntimeError, ValueError):
                self._raise_misfit(group)
                raise
        if not has_gradients:
            _warn(
                "no parameter has a gradient, so the step changed nothing. Were the model's parameters exchanged after "
                "the optimizer was built, by load_state_dict(assign=True), to_empty or fully_shard? Build it after that"
            )
        return loss

    def _step_group(self, group: dict[str, Any], clock: Tensor, grad_scale: Tensor | None) -> bool:
        """Update the parameters of a group; return whether one has a gradient."""
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}  # one launch each, nearly always a single one
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                by_dtype.setdefault(p.dtype, []).append((p, grad))
        if not by_dtype:
            return False
        # The operator advances the clock: launches of other dtypes start from copies of the same step.
        clocks = [clock]
        while len(clocks) < len(by_dtype):
            clocks.append(clock.clone())
        anchored = group["prior_decay"] != 0
        for pairs, own_clock in zip(by_dtype.values(), clocks, strict=True):
            has_masters = "master" in self.state[pairs[0][0]]
            weights, grads, exp_avg, exp_avg_sq, masters, priors = [], [], [], [], [], []
            for p, grad in pairs:
                state = self.state[p]
                tensors = [p, grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"), state.get("prior")]
                if hasattr(p, "to_local"):
                    tensors = map(local_shard, tensors)
                weight, grad, average, average_sq, master, prior = tensors
                weights.append(weight)
                grads.append(grad.contiguous())
                exp_avg.append(average)
                exp_avg_sq.append(average_sq)
                if has_masters:
                    masters.append(master)
                if anchored:
                    if prior is None:
                        raise ValueError(
                            "prior_decay: was 0 when the optimizer was built, so there is no prior to decay towards"
                        )
                    priors.append(prior)
            if has_masters:
                leads = list(map(operator.sub, map(_version, weights), map(_version, masters)))
                if leads != [self._leads.get(id(p)) for p, _ in pairs]:
                    self._update_masters()
            dph_kernels.laprop(
                masters if has_masters else weights,
                grads,
                exp_avg,
                exp_avg_sq,
                priors if anchored else None,
                copies=weights if has_masters else None,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                prior_decay=group["prior_decay"],
                grad_scale=grad_scale,
                clock=own_clock,
            )
        return True

    # Mixed precision

    def to_mixed_precision(self, dtype: torch.dtype) -> None:
        """Keep the fp32 weights as masters and cast the parameters to ``dtype`` (bf16); gradients accumulate in fp32.

        ValueError for sharded parameters, which FSDP2 casts itself (MixedPrecisionPolicy).
        """
        params = self._params()
        if any(sharding(p) is not None for p in params):
            raise ValueError(
                "to_mixed_precision: expected whole parameters, got sharded ones: use FSDP2's MixedPrecisionPolicy"
            )
        self._fit_state()
        for p in params:
            master = self.state[p].get("master", p.detach())
            self._replace_data(p, p.data.to(dtype))
            self._set_master(p, master)
            p.grad_dtype = torch.float32

    def accumulate_in_fp32(self, enabled: bool) -> None:
        """Let the gradients of parameters that have masters accumulate in fp32, or keep them in bf16.

        Fp32 is for gradient accumulation. The gradients of a single micro-batch are bf16 numbers already, and fp32
        would cost a pass over all of them without a gain, except for a tied embedding, whose two uses then add up in
        bf16. Call it while no parameter has a gradient.
        """
        for group in self.param_groups:
            for p in group["params"]:
                grad_dtype = torch.float32 if enabled else p.dtype
                if "master" in self.state[p] and p.grad_dtype != grad_dtype:
                    p.grad_dtype = grad_dtype

    def to_full_precision(self) -> None:
        """Replace the parameters by their fp32 masters: the inverse of ``to_mixed_precision``."""
        self._update_masters()
        for p in self._params():
            if "master" in self.state[p]:
                p.grad = None
                self._replace_data(p, self.state[p].pop("master"))
                p.grad_dtype = p.dtype

    def _replace_data(self, p: Tensor, data: Tensor) -> None:
        """Replace the storage of a parameter by one with the same values in another dtype."""
        source = self._sources.get(p)
        is_unchanged = source is not None and source == _Source.read(p, source.is_prior)
        p.data = data
        if is_unchanged:
            self._sources[p] = _Source.read(p, source.is_prior)

    def _params(self) -> list[Tensor]:
        """Return the parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the layout of PyTorch's optimizers: tensors per parameter, and numbers per group.

        t is the ``step`` of every parameter and a the ``rate_average`` of its group: copies, on the CPU. The other
        tensors are the optimizer's own.
        """
        self._fit_state()
        self._update_masters()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state, groups = {}, []
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            step, rate_average = clock.tolist()
            indices = []
            for p in group["params"]:
                if not self.state.get(p):
                    self._raise_misfit(group)
                indices.append(len(state))
                state[len(state)] = {**self.state[p], "step": torch.tensor(step, dtype=torch.float32)}
            groups.append({**group, "rate_average": rate_average, "params": indices})
        packed = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, packed)
            packed = packed if result is None else result
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of ``state_dict``; a ``step`` of the group, as older versions saved it, is accepted too.

        Raises before anything has changed.

        Raises:
            TypeError: ``state_dict`` or one of its settings has the wrong type.
            ValueError: a tensor is missing, has another shape, or is sharded and the parameter is not; a group decays
                towards a prior that the state lacks; both sides have names of parameters, and they differ.
        """
        state_dict = copy.copy(state_dict)  # for the hooks, as PyTorch's optimizers
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        former, former_groups = self.state, self.param_groups
        saved_ones = saved_groups(state_dict, former_groups)

        self.state, self.param_groups, self._sources, self._leads = defaultdict(dict), [], {}, {}
        for number, (former_group, saved) in enumerate(zip(former_groups, saved_ones, strict=True)):
            params, rate = former_group["params"], former_group["lr"]
            group = {**copy.deepcopy(saved.settings), "params": params}
            # A CUDA graph reads rate and clock at their addresses: both are filled in place.
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(group["lr"])
            clock = self._clocks[number].copy_(torch.tensor(saved.clock, dtype=torch.float64))
            self._clocks[number] = clock = clock.to(_clock_device(group))
            for p, tensors in zip(params, saved.tensors, strict=True):
                if tensors is None:
                    tensors = former.get(p)  # of a frozen parameter
                if not tensors:
                    self._create_state(p, group)
                    continue
                self.state[p] = self._adapted(p, tensors)
                if "master" in self.state[p]:
                    self._set_master(p, self.state[p]["master"])
                has_started = saved.clock[0] > 0
                if not has_started or self.state[p].keys() - tensors.keys():  # a master was copied from the parameter
                    self._sources[p] = _Source.read(p, is_prior=not has_started)
            self._show_clock(group, clock)
            self.param_groups.append(group)

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def weights(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return every parameter in full precision (its master if it has one), by ``names``."""
        self._update_masters()
        return {names[p]: self.state[p].get("master", p.detach()) for p in self._params()}

    def to_tensors(self, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict]:
        """Return the state as flat tensors and a JSON-ready dictionary, for safetensors; masters are in ``weights``."""
        self._fit_state()
        tensors, groups = {}, []
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            params = [names[p] for p in group["params"]]
            for p, name in zip(group["params"], params, strict=True):
                for key, value in self.state[p].items():
                    if key not in ("step", "master"):
                        tensors[f"{name}/{key}"] = value
            settings = {key: value for key, value in group.items() if key != "param_names"}
            clock_values = dict(zip(CLOCK, clock.tolist(), strict=True))
            groups.append({**settings, "lr": float(group["lr"]), **clock_values, "params": params})
        return tensors, {"groups": groups}

    def from_tensors(self, names: dict[Tensor, str], tensors: dict[str, Tensor], meta: dict) -> None:
        """Load the result of ``to_tensors``, after the weights have been set. ValueError as ``load_state_dict``."""
        own_params = [[names[p] for p in group["params"]] for group in self.param_groups]
        compare_groups(own_params, [group["params"] for group in meta["groups"]])
        # By name, in this optimizer's order.
        positions = {names[p]: i for i, p in enumerate(self._params())}
        state: dict[int | str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            state.setdefault(positions.get(name, name), {})[kind] = value
        groups = []
        for group, params in zip(meta["groups"], own_params, strict=True):
            groups.append({**group, "params": [positions[name] for name in params]})
        self.load_state_dict({"state": state, "param_groups": groups})


def _clock_device(group: dict[str, Any]) -> torch.device:
    """Return the device of a group's clock: that of the parameters, or the CPU if there are none, or none with data."""
    params = group["params"]
    return params[0].device if params and not params[0].is_meta else torch.device("cpu")


def _lead(p: Tensor, master: Tensor) -> int:
    """Return the number of versions, or changes in place, by which a parameter is ahead of its master."""
    return local_shard(p)._version - local_shard(master)._version


def _misfit(p: Tensor, state: dict[str, Any]) -> str | None:
    """Return how a parameter differs from the one that the state was made of: CAST, EXCHANGED, or None."""
    exp_avg = state.get("exp_avg")
    if exp_avg is None or exp_avg.shape != p.shape or exp_avg.is_meta != p.is_meta:
        return EXCHANGED
    if (hasattr(p, "to_local") or hasattr(exp_avg, "to_local")) and sharding(exp_avg) != sharding(p):
        return EXCHANGED
    has_fitting_master = ("master" in state) == (p.dtype != exp_avg.dtype)
    if exp_avg.device != p.device or exp_avg.dtype != _state_dtype(p) or not has_fitting_master:
        return CAST
    return None


def _same_values(prior: Tensor, p: Tensor) -> bool:
    """Whether both have the same values, in the coarser of their dtypes."""
    prior, weight = local_shard(prior), local_shard(p)
    return torch.equal(prior.to(weight.dtype), weight) or torch.equal(prior, weight.to(prior.dtype))


def _settings_fit(group: dict[str, Any]) -> bool:
    """Whether the settings are floats in their ranges, as usual; if not, ``check_settings`` decides."""
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        return False
    rate, eps, weight_decay, prior_decay = group["lr"], group["eps"], group["weight_decay"], group["prior_decay"]
    return (
        FLOAT.issuperset(map(type, (rate, eps, weight_decay, prior_decay, beta1, beta2)))
        and 0.0 <= rate < math.inf
        and 0.0 <= eps < math.inf
        and 0.0 <= weight_decay < math.inf
        and 0.0 <= prior_decay < math.inf
        and 0.0 <= beta1 < 1.0
        and 0.0 <= beta2 < 1.0
    )


def _warn(message: str) -> None:
    """Warn at the caller of ``step``, past the functions that PyTorch wraps around it."""
    warnings.warn(f"LaProp: {message}", UserWarning, stacklevel=5)


def _state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: fp64 for fp64, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@torch.no_grad()
def gradient_norm(params: Iterable[Tensor], limit: float = math.inf) -> GradientNorm:
    """Norm of all gradients together, the coefficient that scales it down to ``limit``, and whether it is finite.

    All three are on the gradients' device, without a synchronisation; ``scale`` is for ``LaProp.step(grad_scale=...)``.
    With sharded parameters every rank has to call this, and all get the same result. ``params`` may be one tensor.

    Raises:
        TypeError: ``limit`` is no number.
        ValueError: ``limit`` is negative or NaN, or a gradient is sparse.
    """
    if not isinstance(limit, numbers.Real):
        raise TypeError(f"limit: expected a number, got {shown(limit)} of type {type(limit).__name__}")
    checks.number("limit", limit, 0.0)
    if isinstance(params, Tensor):
        params = [params]
    by_sharding: dict[tuple | None, list[Tensor]] = {}
    for p in params:
        grad = p.grad
        if grad is not None:
            if grad.layout != torch.strided:
                raise ValueError(f"grads: expected dense gradients, got one in {grad.layout}")
            mesh_and_placements = sharding(grad) if hasattr(grad, "to_local") else None
            by_sharding.setdefault(mesh_and_placements, []).append(local_shard(grad).contiguous())
    if by_sharding.keys() <= {None}:
        return dph_kernels.gradient_norm(by_sharding.get(None, []), max_norm=limit)
    squares = []
    for shards, grads in by_sharding.items():
        square = dph_kernels.gradient_norm(grads).norm.square()
        mesh, placements = shards or (None, ())
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(square, group=mesh.get_group(dim))
            elif not placement.is_replicate():  # a replica counts once
                raise ValueError(f"grads: expected sharded or replicated gradients, got {placement}")
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    finite = norm.isfinite()
    scale = torch.where(finite, torch.where(norm > limit, limit / norm, 1.0), math.nan)
    return GradientNorm(norm, scale.float().reshape(1), finite)


def local_shard(tensor: Tensor | None) -> Tensor | None:
    """Return this rank's shard, which shares the tensor's memory; a plain tensor, or None, is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    prior_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
) -> list[dict]:
    """Return two groups, with and without decay: the latter has all parameters named with a word of ``no_decay``.

    Only parameters that require a gradient; a tied one counts once, under its first name. An empty group is left out.
    The groups contain the parameters' names, which ``LaProp.load_state_dict`` compares with those of the state.
    """
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay: expected a list of words, got the string {shown(no_decay)}")
    decayed = {"params": [], "param_names": [], "weight_decay": weight_decay, "prior_decay": prior_decay}
    not_decayed = {"params": [], "param_names": [], "weight_decay": 0.0, "prior_decay": 0.0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = not_decayed if any(word in name for word in no_decay) else decayed
            group["params"].append(p)
            group["param_names"].append(name)
    return [group for group in (decayed, not_decayed) if group["params"]]


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """Return the learning rate of step 1 to ``total``: linear from peak / warmup to peak, then cosine to ``final``.

    Step ``warmup`` runs at ``peak``, step ``total`` at ``final``; later steps stay there. ValueError for step < 1.
    """
    checks.number("step", step, 1)
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
