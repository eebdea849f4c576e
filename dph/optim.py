"""LaProp with decoupled prior regularisation, the gradient norm, parameter groups and the learning-rate schedule."""

import copy
import math
import numbers
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dph_kernels
from dph._optim_checks import (
    CLOCK,
    PRIOR_DTYPES,
    adapted,
    check_grad_scale,
    check_params,
    check_settings,
    compare_groups,
    convert_settings,
    merged,
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
HALVES = (torch.bfloat16, torch.float16)
CAST, EXCHANGED = "cast", "exchanged"  # a parameter since its state was made
_version, _shape, _dtype = map(operator.attrgetter, ("_version", "shape", "dtype"))


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

    Load the model's weights before the optimizer is built: the first step compares parameters with their priors, and
    warns if they differ. A CUDA graph that captures the first step omits this, as it would wait for the device.

    Until the first step after the optimizer was built, or after ``load_state_dict``, parameters may be cast or moved.
    The state follows when it is next used: moments and priors keep their values; a parameter cast to bf16 or fp16 gets
    a master, or keeps the one that it has; one cast from them to fp32 takes the values of its master. Before the very
    first step parameters may also be exchanged for others (accelerate does so for FSDP2), whose values become the
    priors. ``step`` refuses all other changes of this kind.

    Values that are written into a bf16 or fp16 parameter between two steps replace those of its master, unless they are
    written through ``.data``. A step that refuses a setting, a gradient or a parameter updates nothing.
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
        self._unstepped: list[bool] = []  # of each group: whether ``step`` is still to be called
        self._leads: dict[int, int] = {}  # by a parameter's id: number of versions that it is ahead of its master
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that copies and pickles contain."""
        return {**super().__getstate__(), "_clocks": self._clocks, "_unstepped": self._unstepped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, whose tensors have other addresses and versions."""
        super().__setstate__(state)
        self.__dict__.setdefault("_unstepped", [False] * len(self._clocks))  # older pickles
        self._leads = {}
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            group["prior_dtype"] = prior_dtype_name(group["prior_dtype"])
            self._show_clock(group, clock)
            for p in group["params"]:
                if "master" in self.state[p]:  # whose lead a copy does not know
                    self._update_master(p)

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
        self._unstepped.append(True)
        for p in group["params"]:
            self._create_state(p, group)
        self._show_clock(group, self._clocks[-1])

    # State of a parameter

    def _create_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Set moments to zero, and copy master and prior from the parameter."""
        dtype = _state_dtype(p)
        self.state[p] = state = {
            "step": None,  # see _show_clock
            "exp_avg": torch.zeros_like(p, dtype=dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype, requires_grad=False),
        }
        if p.dtype != dtype:
            self._set_master(p, p.detach().to(dtype))
        if group["prior_decay"] != 0:
            prior_dtype = dtype if group["prior_dtype"] == "float32" else PRIOR_DTYPES[group["prior_dtype"]]
            state["prior"] = p.detach().to(prior_dtype, copy=True)

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

    @torch.no_grad()
    def _update_master(self, p: Tensor) -> None:
        """Copy the elements that were written into the parameter since the last step to its master.

        The other elements of the master keep their precision.
        """
        master = self.state[p]["master"]
        wide = local_shard(master)
        wide.copy_(merged(local_shard(p), wide))
        self._set_master(p, master)

    @torch.no_grad()
    def _update_masters(self) -> None:
        """Fit the state, and copy what was written into parameters since the last step to their masters."""
        self._fit_state()
        for p in self._params():
            master = self.state[p].get("master")
            if master is not None and _lead(p, master) != self._leads.get(id(p)):
                self._update_master(p)

    # Parameters that change before the first step

    @torch.no_grad()
    def _fit_state(self) -> None:
        """Before the first ``step`` of a group, let its state follow parameters that were cast, moved or exchanged.

        The prior of one that was cast or moved stays. An exchanged one begins with its current value as the prior: the
        original may be gone, or empty on this rank.
        """
        if True not in self._unstepped:
            return
        for number, group in enumerate(self.param_groups):
            if not self._unstepped[number]:
                continue
            clock = self._clocks[number]
            for p in group["params"]:
                kind = _misfit(p, self.state.get(p, {}))
                if kind == CAST:
                    self._follow_cast(p)
                elif kind == EXCHANGED:
                    if clock[0] > 0:
                        self._raise_misfit(group)
                    self._create_state(p, group)
            self._clocks[number] = clock.to(_clock_device(group))
            self._show_clock(group, self._clocks[number])
        for former in self.state.keys() - set(self._params()):
            del self.state[former]

    def _follow_cast(self, p: Tensor) -> None:
        """Adapt the state of a parameter that was cast or moved; the precision of a master is kept."""
        master = self.state[p].get("master")
        self.state[p] = state = adapted(p, self.state[p], _state_dtype(p))
        if master is not None:
            # The parameter was rounded to one of the halves before it was cast.
            values = merged(local_shard(p), local_shard(master), HALVES)
            local_shard(state.get("master", p)).copy_(values)
        if "master" in state:
            self._set_master(p, state["master"])

    def _compare_priors(self) -> str | None:
        """Before the very first step of a group, let masters follow its parameters, and compare these with the priors.

        Returns the text of a warning, None if all are equal. Waits for the device.
        """
        changed = []
        for group, clock, is_unstepped in zip(self.param_groups, self._clocks, self._unstepped, strict=True):
            if not is_unstepped or clock[0] > 0:
                continue
            for p in group["params"]:
                state = self.state[p]
                if "master" in state:
                    self._update_master(p)
                if "prior" in state and not _same_values(state["prior"], p):
                    changed.append(p)
        if not changed:
            return None
        return (
            f"{len(changed)} of {len(self._params())} parameters differ from their priors before the first step, first "
            f"{self._place(changed[0])}; prior_decay pulls them back to the values at the building of the optimizer. "
            "Load the model's weights first, then build the optimizer"
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
            if kind := _misfit(p, state):
                if not state:
                    self.state.pop(p, None)  # made by _launches' access to it
                raise misfit_error(self._place(p), p, state, is_known=kind == CAST)

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        ``grad_scale``, one fp32 element on the same device, multiplies every gradient as it is read; if it is not
        finite, nothing changes at all (``gradient_norm`` returns NaN for gradients that are not finite).

        Raises:
            TypeError: ``closure`` is no function, or ``grad_scale`` or a setting of a group has the wrong type.
            ValueError: a setting of a group is out of range; a gradient is sparse; a parameter was exchanged, cast or
                moved after the first step; a group decays to priors that it lacks; a tensor has the wrong shape, dtype
                or device.
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
        is_first = True in self._unstepped
        if is_first:
            self._fit_state()
            is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if not is_capturing and (warning := self._compare_priors()):
                _warn(warning)
        try:
            launches = []
            for group, clock in zip(self.param_groups, self._clocks, strict=True):
                launches += self._launches(group, clock, grad_scale)
            # The operator checks its arguments before it changes anything. So that an error changes nothing, launches
            # that would fail precede the others. The first launch is checked by the operator alone, which is faster.
            failing, fitting = [], launches[:1]
            for launch in launches[1:]:
                (fitting if _launch_fits(launch) else failing).append(launch)
            for launch in failing + fitting:
                dph_kernels.laprop(**launch)
        except (AttributeError, KeyError, RuntimeError, ValueError):
            for group in self.param_groups:
                self._raise_misfit(group)
            raise
        if is_first:
            self._unstepped = [False] * len(self._unstepped)
        if not launches:
            _warn(
                "no parameter has a gradient, so the step changed nothing. Were the model's parameters exchanged after "
                "the optimizer was built, by load_state_dict(assign=True), to_empty or fully_shard? Build it after that"
            )
        return loss

    def _launches(self, group: dict[str, Any], clock: Tensor, grad_scale: Tensor | None) -> list[dict[str, Any]]:
        """Return the operator's arguments for a group's gradients: one launch per dtype, nearly always a single one.

        Raises ValueError if the group decays towards priors that it lacks.
        """
        by_dtype: dict[torch.dtype, list[tuple[Tensor | None, ...]]] = defaultdict(list)
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                state = self.state[p]
                row = p, grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"), state.get("prior")
                by_dtype[p.dtype].append(row)
        launches = []
        for rows in by_dtype.values():
            columns = list(zip(*rows, strict=True))
            params = columns[0]
            if not checks.PLAIN.issuperset(map(type, params)):
                columns = [list(map(local_shard, column)) for column in columns]
            weights, grads, exp_avg, exp_avg_sq, masters, priors = columns
            has_masters, has_priors = masters[0] is not None, group["prior_decay"] != 0
            if has_masters:
                leads = list(map(operator.sub, map(_version, weights), map(_version, masters)))
                if leads != list(map(self._leads.get, map(id, params))):
                    self._update_masters()
            elif masters.count(None) < len(masters):
                raise ValueError("params: some were cast since the last step")  # _raise_misfit names the first one
            if has_priors and type(None) in set(map(type, priors)):
                raise ValueError(
                    "prior_decay: was 0 when the optimizer was built, so there is no prior to decay towards"
                )
            launches.append(
                {
                    "params": masters if has_masters else weights,
                    "grads": list(map(Tensor.contiguous, grads)),
                    "exp_avg": exp_avg,
                    "exp_avg_sq": exp_avg_sq,
                    "priors": priors if has_priors else None,
                    "copies": weights if has_masters else None,
                    "lr": group["lr"],
                    "beta1": group["betas"][0],
                    "beta2": group["betas"][1],
                    "eps": group["eps"],
                    "weight_decay": group["weight_decay"],
                    "prior_decay": group["prior_decay"],
                    "grad_scale": grad_scale,
                    # The operator advances the clock: launches of other dtypes start from copies of the same step.
                    "clock": clock.clone() if launches else clock,
                }
            )
        return launches

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
            p.data = p.data.to(dtype)
            self._set_master(p, master)
            p.grad_dtype = torch.float32

    def accumulate_in_fp32(self, enabled: bool) -> None:
        """Let the gradients of parameters that have masters accumulate in fp32, or keep them in bf16.

        Fp32 is for gradient accumulation. The gradients of a single micro-batch are bf16 numbers already, and fp32
        would cost a pass over all of them without a gain, except for a tied embedding, whose two uses then add up in
        bf16. Call it while no parameter has a gradient.
        """
        self._fit_state()
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
                p.data = self.state[p].pop("master")
                p.grad_dtype = p.dtype

    def _params(self) -> list[Tensor]:
        """Return the parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the layout of PyTorch's optimizers: tensors per parameter, and numbers per group.

        t is the ``step`` of every parameter and a the ``rate_average`` of its group: copies, on the CPU. The other
        tensors are the optimizer's own.
        """
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
            TypeError: ``state_dict``, one of its groups, settings, names or keys has the wrong type.
            ValueError: a tensor is missing, has another shape, or is sharded and the parameter is not; a group decays
                towards a prior that the state lacks; both sides have names of parameters, and they differ.
        """
        state_dict = copy.copy(state_dict)  # for the hooks, as PyTorch's optimizers
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        former, former_groups = self.state, self.param_groups
        saved_ones = saved_groups(state_dict, former_groups)

        self.state, self.param_groups, self._leads = defaultdict(dict), [], {}
        self._unstepped = [True] * len(former_groups)
        for number, (former_group, saved) in enumerate(zip(former_groups, saved_ones, strict=True)):
            params, rate = former_group["params"], former_group["lr"]
            group = {**saved.settings, "params": params}
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
                self.state[p] = adapted(p, tensors, _state_dtype(p))
                if "master" in self.state[p]:
                    self._set_master(p, self.state[p]["master"])
                elif "master" in tensors:  # the parameter was cast from one of the halves
                    local_shard(p).copy_(merged(local_shard(p), local_shard(tensors["master"]), HALVES))
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
    """Whether both have the same values, in the coarser of their dtypes; True if one has no memory, as on meta."""
    prior, weight = local_shard(prior), local_shard(p)
    if not checks.in_memory((prior, weight)):
        return True
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


def _launch_fits(launch: dict[str, Any]) -> bool:
    """Whether the arguments of ``dph_kernels.laprop`` pass its checks, in a fifth of their time.

    Covers what changes from step to step: parameters, gradients, ``grad_scale`` and the rate. The state is taken to be
    as the optimizer made it.
    """
    params, grads, exp_avg, copies = launch["params"], launch["grads"], launch["exp_avg"], launch["copies"]
    weights = copies or params
    dtype, device = params[0].dtype, exp_avg[0].device
    shapes = list(map(_shape, weights))
    return (
        shapes == list(map(_shape, grads))
        and shapes == list(map(_shape, exp_avg))
        and (copies[0].dtype in HALVES if copies else {dtype}.issuperset(map(_dtype, exp_avg)))
        and {*HALVES, torch.float32, dtype}.issuperset(map(_dtype, grads))
        and {exp_avg[0].get_device()}.issuperset(map(Tensor.get_device, weights))  # half the time of their device
        and all(map(Tensor.is_contiguous, weights))
        and all(x.device == device for x in (launch["grad_scale"], launch["lr"]) if isinstance(x, Tensor))
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
    *,
    head_weight_decay: float | None = None,
    head_prior_decay: float | None = None,
) -> list[dict]:
    """Return two groups, with and without decay: the latter has all parameters named with a word of ``no_decay``.

    With decays of their own, the other parameters of the reward heads and their poolers are a group between the two.
    Only parameters that require a gradient; a tied one counts once, under its first name. An empty group is left out.
    The groups contain the parameters' names, which ``LaProp.load_state_dict`` compares with those of the state.
    """
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay: expected a list of words, got the string {shown(no_decay)}")
    decayed = {"params": [], "param_names": [], "weight_decay": weight_decay, "prior_decay": prior_decay}
    not_decayed = {"params": [], "param_names": [], "weight_decay": 0.0, "prior_decay": 0.0}
    heads = decayed
    if head_weight_decay is not None or head_prior_decay is not None:
        heads = {
            "params": [],
            "param_names": [],
            "weight_decay": weight_decay if head_weight_decay is None else head_weight_decay,
            "prior_decay": prior_decay if head_prior_decay is None else head_prior_decay,
        }
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = heads if name.startswith("heads.") else decayed
            if any(word in name for word in no_decay):
                group = not_decayed
            group["params"].append(p)
            group["param_names"].append(name)
    groups = (decayed, not_decayed) if heads is decayed else (decayed, heads, not_decayed)
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """Return the learning rate of step 1 to ``total``: linear from peak / warmup to peak, then cosine to ``final``.

    Step ``warmup`` runs at ``peak``, step ``total`` at ``final``; later steps stay there. ValueError for step < 1.
    """
    checks.number("step", step, 1)
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
