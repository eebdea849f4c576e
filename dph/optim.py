"""LaProp with decoupled prior regularisation, the gradient norm, parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dph_kernels
from dph_kernels import GradientNorm, checks

__all__ = ["LaProp", "gradient_norm", "param_groups", "warmup_cosine"]

NO_DECAY = ("norm", "bias", "embedding")
PRIOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCK = ("step", "rate_average")  # values of a group's clock: t and a of LaProp's equations


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

    ``params`` are parameters or groups (``param_groups``); a group may override lr, betas, eps, both decays and
    ``prior_dtype``.

    ``prior_dtype=torch.bfloat16`` rounds θ₀, which saves two bytes per parameter and 1/16 of the traffic. The anchor is
    then off by up to δ = 2⁻⁸ |θ₀| (0.4%), once and for all: after n steps a weight is off by δ (1 − (1 − λ_p η)ⁿ),
    never by more than δ. Weights that are bf16 numbers to begin with lose nothing.

    t and a are counted on the device and advance with the update itself: a step that ``grad_scale`` skips leaves both
    unchanged. A CUDA graph can capture ``step``: give lr as a tensor on the device and change it in place. Parameters
    that FSDP2 has sharded are updated shard by shard.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        prior_decay: float = 0.0,
        prior_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the state and copy the priors.

        ValueError for a rate, eps or decay below 0, a beta outside [0, 1), a prior in neither fp32 nor bf16, and a
        parameter that is not contiguous.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "prior_decay": prior_decay,
            "prior_dtype": prior_dtype,
        }
        self._clocks: list[Tensor] = []  # of each group: [t, a], fp64, on its device
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that copies and pickles contain."""
        return {**super().__getstate__(), "_clocks": self._clocks}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, whose state and priors begin with its current values."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device if group["params"] else None
        self._clocks.append(torch.zeros(2, dtype=torch.float64, device=device))
        for p in group["params"]:
            state_dtype = _state_dtype(p)
            state = self.state[p]
            state["exp_avg"] = torch.zeros_like(p, dtype=state_dtype, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=state_dtype, requires_grad=False)
            if p.dtype != state_dtype:
                state["master"] = p.detach().to(state_dtype)
            if group["prior_decay"] != 0:
                prior_dtype = state_dtype if group["prior_dtype"] == torch.float32 else group["prior_dtype"]
                state["prior"] = p.detach().to(prior_dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        ``grad_scale``, one fp32 element on the same device, multiplies every gradient as it is read; if it is not
        finite, nothing changes at all (``gradient_norm`` returns NaN for gradients that are not finite).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            by_dtype: dict[torch.dtype, list[Tensor]] = {}  # one launch each, nearly always a single one
            for p in group["params"]:
                if p.grad is not None:
                    by_dtype.setdefault(p.dtype, []).append(p)
            if not by_dtype:
                continue
            # The operator advances the clock: launches of other dtypes start from copies of the same step.
            clocks = [clock]
            while len(clocks) < len(by_dtype):
                clocks.append(clock.clone())
            anchored = group["prior_decay"] != 0
            for params, own_clock in zip(by_dtype.values(), clocks, strict=True):
                has_masters = "master" in self.state[params[0]]
                weights, grads, exp_avg, exp_avg_sq = [], [], [], []
                masters = [] if has_masters else weights
                priors = [] if anchored else None
                for p in params:
                    state = self.state[p]
                    weights.append(local_shard(p))
                    grads.append(local_shard(p.grad).contiguous())
                    exp_avg.append(local_shard(state["exp_avg"]))
                    exp_avg_sq.append(local_shard(state["exp_avg_sq"]))
                    if has_masters:
                        masters.append(local_shard(state["master"]))
                    if anchored:
                        if "prior" not in state:
                            raise ValueError(
                                "prior_decay: was 0 when the optimizer was built, so there is no prior to decay towards"
                            )
                        priors.append(local_shard(state["prior"]))
                dph_kernels.laprop(
                    masters,
                    grads,
                    exp_avg,
                    exp_avg_sq,
                    priors,
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
        return loss

    def to_mixed_precision(self, dtype: torch.dtype) -> None:
        """Keep the fp32 weights as masters and cast the parameters to ``dtype`` (bf16); gradients accumulate in fp32.

        ValueError for sharded parameters, which FSDP2 casts itself (MixedPrecisionPolicy).
        """
        params = self._params()
        if any(sharding(p) is not None for p in params):
            raise ValueError(
                "to_mixed_precision: expected whole parameters, got sharded ones: use FSDP2's MixedPrecisionPolicy"
            )
        for p in params:
            self.state[p].setdefault("master", p.detach())
            p.data = p.data.to(dtype)
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
        for p in self._params():
            if "master" in self.state[p]:
                p.grad = None
                p.data = self.state[p].pop("master")
                p.grad_dtype = p.dtype

    def _params(self) -> list[Tensor]:
        """Return the parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the layout of PyTorch's optimizers: tensors per parameter, and numbers per group.

        t is the ``step`` of every parameter and a the ``rate_average`` of its group: copies, on the CPU. The other
        tensors are the optimizer's own.
        """
        packed = super().state_dict()
        for group, clock in zip(packed["param_groups"], self._clocks, strict=True):
            step, group["rate_average"] = clock.tolist()
            for i in group["params"]:
                packed["state"][i] = {"step": torch.tensor(step, dtype=torch.float32), **packed["state"][i]}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of ``state_dict``; a ``step`` of the group, as older versions saved it, is accepted too.

        ValueError if a tensor is missing, has another shape, or is sharded and the parameter is not, and if a group
        decays towards a prior that the state lacks.
        """
        saved_groups = [_SavedGroup(group, state_dict["state"]) for group in state_dict["param_groups"]]
        for group, saved in zip(self.param_groups, saved_groups, strict=False):
            saved.check(group)
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": [saved.settings for saved in saved_groups]})
        for group, rate, saved, clock in zip(self.param_groups, rates, saved_groups, self._clocks, strict=True):
            # A CUDA graph reads rate and clock at their addresses: both are filled in place.
            group["lr"] = rate.fill_(float(group["lr"])) if isinstance(rate, Tensor) else float(group["lr"])
            clock.copy_(torch.tensor(saved.clock, dtype=torch.float64))
            # The base class casts state to the parameter's dtype, which would round the fp32 state of bf16 parameters.
            for p, tensors in zip(group["params"], saved.tensors, strict=True):
                self.state[p] = {key: value.detach().to(p.device, copy=True) for key, value in tensors.items()}
                if p.dtype == _state_dtype(p):
                    self.state[p].pop("master", None)
                elif "master" not in tensors:
                    self.state[p]["master"] = p.detach().to(_state_dtype(p))

    def weights(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return every parameter in full precision (its master if it has one), by ``names``."""
        return {names[p]: self.state[p].get("master", p.detach()) for p in self._params()}

    def to_tensors(self, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict]:
        """Return the state as flat tensors and a JSON-ready dictionary, for safetensors; masters are in ``weights``."""
        tensors, groups = {}, []
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            params = [names[p] for p in group["params"]]
            for p, name in zip(group["params"], params, strict=True):
                for key, value in self.state[p].items():
                    if key != "master":
                        tensors[f"{name}/{key}"] = value
            groups.append(
                {
                    **group,
                    "lr": float(group["lr"]),
                    "prior_dtype": str(group["prior_dtype"]).removeprefix("torch."),
                    **dict(zip(CLOCK, clock.tolist(), strict=True)),
                    "params": params,
                }
            )
        return tensors, {"groups": groups}

    def from_tensors(self, names: dict[Tensor, str], tensors: dict[str, Tensor], meta: dict) -> None:
        """Load the result of ``to_tensors``, after the weights have been set. ValueError as ``load_state_dict``."""
        own_params = [[names[p] for p in group["params"]] for group in self.param_groups]
        saved_params = [group["params"] for group in meta["groups"]]
        if own_params != saved_params:
            different = sorted(set().union(*own_params) ^ set().union(*saved_params))
            got = different[:4] or own_params
            raise ValueError(f"optimizer state: expected this model's parameter groups, got others: {got}")
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            state.setdefault(name, {})[kind] = value
        groups = []
        for group in meta["groups"]:
            prior_dtype = PRIOR_DTYPES[group.get("prior_dtype", "float32")]
            groups.append({**group, "betas": tuple(group["betas"]), "prior_dtype": prior_dtype})
        self.load_state_dict({"state": state, "param_groups": groups})


class _SavedGroup:
    """One group of a saved state.

    Attributes:
        settings: entries of the optimizer's group.
        tensors: state of each parameter, without its clock.
        clock: t and a.
    """

    def __init__(self, group: dict, state: dict) -> None:
        self.settings = {"prior_dtype": torch.float32, **_without_clock(group)}
        states = [state.get(i, {}) for i in group["params"]]
        self.tensors = [_without_clock(entries) for entries in states]
        self.clock = []
        for name in CLOCK:  # the group's number, or the one that all its parameters share
            holders = [group] if name in group else states
            numbers = {float(holder[name]) if name in holder else None for holder in holders}
            if len(numbers) > 1 or None in numbers:
                got = numbers or "none"
                raise ValueError(f"state_dict: expected one {name} for all parameters of a group, got {got}")
            self.clock.append(numbers.pop() if numbers else 0.0)

    def check(self, group: dict) -> None:
        """Raise ValueError unless the tensors fit the parameters of the optimizer's ``group``."""
        for i, (p, tensors) in enumerate(zip(group["params"], self.tensors, strict=False)):
            if missing := {"exp_avg", "exp_avg_sq"} - tensors.keys():
                raise ValueError(f"state_dict: expected {' and '.join(sorted(missing))} of parameter {i}, got none")
            for key, value in tensors.items():
                checks.shape(f"state_dict: {key} of parameter {i}", value, *p.shape)
                if sharding(value) != sharding(p):
                    raise ValueError(
                        f"state_dict: {key} of parameter {i}: expected sharding {sharding(p)}, got {sharding(value)}"
                    )
        decay = group["prior_decay"] or self.settings["prior_decay"]
        if decay and any("prior" not in tensors for tensors in self.tensors):
            raise ValueError(
                f"state_dict: expected a prior for every parameter, because prior_decay is {decay}, "
                "got a state without one; the prior is the weights at the start of the stage and cannot be recovered"
            )


def _without_clock(entries: dict) -> dict:
    """Return the entries of a group, or of a parameter's state, except t and a."""
    return {key: value for key, value in entries.items() if key not in CLOCK}


def _check_group(group: dict) -> None:
    """Raise ValueError for settings out of range and for parameters that are not contiguous."""
    checks.number("lr", float(group["lr"]), 0.0)
    checks.number("eps", group["eps"], 0.0)
    checks.number("weight_decay", group["weight_decay"], 0.0)
    checks.number("prior_decay", group["prior_decay"], 0.0)
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        checks.number(name, beta, 0.0, 1.0, below=True)
    if group["prior_dtype"] not in PRIOR_DTYPES.values():
        raise ValueError(f"prior_dtype: expected torch.float32 or torch.bfloat16, got {group['prior_dtype']}")
    for i, p in enumerate(group["params"]):
        if not local_shard(p).is_contiguous():
            shape, strides = list(p.shape), list(p.stride())
            raise ValueError(f"params[{i}]: expected a contiguous tensor of shape {shape}, got strides {strides}")


def _state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: fp64 for fp64, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


@torch.no_grad()
def gradient_norm(params: Iterable[Tensor], limit: float = math.inf) -> GradientNorm:
    """Norm of all gradients together, the coefficient that scales it down to ``limit``, and whether it is finite.

    All three are on the gradients' device, without a synchronisation; ``scale`` is for ``LaProp.step(grad_scale=...)``.
    With sharded parameters every rank has to call this, and all get the same result.
    """
    by_sharding: dict[tuple | None, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            by_sharding.setdefault(sharding(p.grad), []).append(local_shard(p.grad).contiguous())
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


def sharding(tensor: Tensor) -> tuple | None:
    """Return mesh and placements of a sharded tensor (DTensor); None for a plain one."""
    return (tensor.device_mesh, tuple(tensor.placements)) if hasattr(tensor, "to_local") else None


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares the tensor's memory; a plain tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    prior_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
) -> list[dict]:
    """Return two groups, with and without decay: the latter has all parameters named with a word of ``no_decay``.

    Only parameters that require a gradient; a tied one counts once, under its first name. An empty group is left out.
    """
    decayed, not_decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = not_decayed if any(word in name for word in no_decay) else decayed
            group.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "prior_decay": prior_decay},
        {"params": not_decayed, "weight_decay": 0.0, "prior_decay": 0.0},
    ]
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
