"""LaProp with decoupled prior regularisation, parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dph_kernels
from dph.gradients import gradient_norm, local, sharding
from dph_kernels import checks

__all__ = ["LaProp", "gradient_norm", "param_groups", "warmup_cosine"]

NO_DECAY = ("norm", "bias", "embedding")
PRIORS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOCK = ("step", "rate_average")  # what a group's clock holds: t and a of LaProp's equations


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al., arXiv 2002.04839) as the DPH paper uses it, with decay towards the starting weights.

    Per parameter θ with gradient g, prior θ₀ (its value when the optimiser is built), rate η, step t from 1::

        v ← β₂ v + (1 − β₂) g²
        m ← β₁ m + (1 − β₁) η · g / (√v + eps) · √(1 − β₂ᵗ)
        a ← β₁ a + (1 − β₁) η                     one scalar per group; c = a / η, and c = 1 where η = 0
        θ ← θ − λ_p η (θ − θ₀) − λ_w η θ − m / c

    The momentum m carries the rate, so a changing schedule weights each gradient by the rate it came at. A parameter
    without a gradient is left alone. State is fp32; a bf16 or fp16 parameter has an fp32 master in the state, and
    the operator refreshes the parameter from it. θ₀ is kept only where ``prior_decay`` is not 0; it is part of
    ``state_dict``, and loading a state that lacks it raises: the anchor never moves in silence.

    ``params`` are parameters or groups (``param_groups``); a group may override lr, betas, eps, both decays and
    ``prior_dtype``.

    ``prior_dtype=torch.bfloat16`` keeps θ₀ rounded, which saves two bytes per parameter and 1/16 of the traffic. The
    anchor then lies up to δ = 2⁻⁸ |θ₀| (0.4%) off, once and for all: after n steps a weight is off by
    δ (1 − (1 − λ_p η)ⁿ), never by more than δ. Weights that are bf16 numbers to begin with lose nothing.

    t and a count on the device and advance with the update itself: a step that ``grad_scale`` calls off leaves them,
    too, as they were. A CUDA graph can capture ``step``: give lr as a tensor on the device and change it in place.
    Parameters that FSDP2 has sharded are updated shard by shard.
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
        """Take the priors.

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
        """What copies and pickles take along."""
        return {**super().__getstate__(), "_clocks": self._clocks}

    def add_param_group(self, param_group: dict) -> None:
        """Add a group: its state starts here, and so does its prior."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device if group["params"] else None
        self._clocks.append(torch.zeros(2, dtype=torch.float64, device=device))
        for p in group["params"]:
            kind = _state_dtype(p)
            state = self.state[p]
            state["exp_avg"] = torch.zeros_like(p, dtype=kind, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind, requires_grad=False)
            if p.dtype != kind:
                state["master"] = p.detach().to(kind)
            if group["prior_decay"] != 0:
                prior_dtype = kind if group["prior_dtype"] == torch.float32 else group["prior_dtype"]
                state["prior"] = p.detach().to(prior_dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None) -> Tensor | None:
        """One update.

        ``grad_scale``, one fp32 element on the same device, multiplies every gradient as it is read; where it is not
        finite, nothing changes at all (``gradient_norm`` makes it so where a gradient is not finite).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, clock in zip(self.param_groups, self._clocks, strict=True):
            self._update(group, clock, grad_scale)
        return loss

    def _update(self, group: dict, clock: Tensor, grad_scale: Tensor | None) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        beta1, beta2 = group["betas"]
        settings = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "prior_decay": group["prior_decay"],
            "grad_scale": grad_scale,
        }
        parts = list(self._by_precision(params))
        clocks = [clock, *(clock.clone() for _ in parts[1:])]  # of a group in several precisions: one step for all
        for part, own in zip(parts, clocks, strict=True):
            self._launch(part, {**settings, "clock": own})

    def _by_precision(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """One list per dtype: nearly always a single one."""
        for kind in dict.fromkeys(p.dtype for p in params):
            yield [p for p in params if p.dtype == kind]

    def _launch(self, params: list[Tensor], settings: dict) -> None:
        state = [self.state[p] for p in params]
        anchored = settings["prior_decay"] != 0
        if anchored and any("prior" not in s for s in state):
            raise ValueError("prior_decay: was 0 when the optimiser was built, so there is no prior to decay towards")
        weights = [local(p) for p in params]
        lowered = "master" in state[0]
        dph_kernels.laprop(
            [local(s["master"]) for s in state] if lowered else weights,
            [local(p.grad).contiguous() for p in params],
            [local(s["exp_avg"]) for s in state],
            [local(s["exp_avg_sq"]) for s in state],
            [local(s["prior"]) for s in state] if anchored else None,
            copies=weights if lowered else None,
            **settings,
        )

    def lower(self, dtype: torch.dtype) -> None:
        """Keep the fp32 weights as masters and turn the parameters into ``dtype`` (bf16); gradients gather in fp32.

        ValueError where a parameter is sharded: FSDP2 lowers weights itself (MixedPrecisionPolicy).
        """
        if any(sharding(p) is not None for p in self._parameters()):
            raise ValueError("lower: expected whole parameters, got sharded ones: use FSDP2's MixedPrecisionPolicy")
        for p in self._parameters():
            self.state[p].setdefault("master", p.detach())
            p.data = p.data.to(dtype)
            p.grad_dtype = torch.float32

    def gather_in_fp32(self, several: bool) -> None:
        """Let the gradients of lowered parameters gather in fp32 if they come in ``several`` parts.

        A single part's are bf16 as they come: fp32 would cost a pass over all of them for the same numbers, but for the
        tied embedding, whose two uses then add up in bf16. Call it while no gradient is there.
        """
        for p in self._parameters():
            dtype = torch.float32 if several else p.dtype
            if "master" in self.state[p] and p.grad_dtype != dtype:
                p.grad_dtype = dtype

    def restore(self) -> None:
        """The opposite of ``lower``: parameters become their fp32 masters again."""
        for p in self._parameters():
            if "master" in self.state[p]:
                p.grad = None
                p.data = self.state[p].pop("master")
                p.grad_dtype = p.dtype

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """The layout of PyTorch's optimisers: tensors per parameter, ``step`` among them, and numbers per group.

        Of the equations, t is every parameter's ``step`` and a its group's ``rate_average``: copies, on the CPU. The
        other tensors are the optimiser's own.
        """
        packed = super().state_dict()
        for group, clock in zip(packed["param_groups"], self._clocks, strict=True):
            step, group["rate_average"] = clock.tolist()
            for i in group["params"]:
                packed["state"][i] = {"step": torch.tensor(step, dtype=torch.float32), **packed["state"][i]}
        return packed

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what ``state_dict`` gave; a ``step`` of the group, as it was once saved, serves as well.

        ValueError where a tensor is missing, has another shape, or is sharded and the parameter is not, and where a
        group decays towards a prior that the state lacks.
        """
        groups = [_Saved(group, state_dict["state"]) for group in state_dict["param_groups"]]
        for mine, saved in zip(self.param_groups, groups, strict=False):
            saved.check(mine)
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": [saved.settings for saved in groups]})
        for group, rate, saved, clock in zip(self.param_groups, rates, groups, self._clocks, strict=True):
            # A rate that a CUDA graph reads stays where it is, and so does the clock.
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
        """Every parameter in full precision, by the names of ``names``: its master where it has one."""
        return {names[p]: self.state[p].get("master", p.detach()) for p in self._parameters()}

    def to_tensors(self, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict]:
        """The state as flat tensors and a JSON-ready dictionary, for safetensors; masters are in ``weights``."""
        state = {names[p]: self.state[p] for p in self._parameters()}
        tensors = {f"{name}/{key}": s[key] for name, s in state.items() for key in s if key != "master"}
        groups = [
            {
                **group,
                "lr": float(group["lr"]),
                "prior_dtype": str(group["prior_dtype"]).removeprefix("torch."),
                **dict(zip(CLOCK, clock.tolist(), strict=True)),
                "params": [names[p] for p in group["params"]],
            }
            for group, clock in zip(self.param_groups, self._clocks, strict=True)
        ]
        return tensors, {"groups": groups}

    def from_tensors(self, names: dict[Tensor, str], tensors: dict[str, Tensor], meta: dict) -> None:
        """Load what ``to_tensors`` gave, with the weights already in place. ValueError as ``load_state_dict``."""
        mine = [[names[p] for p in group["params"]] for group in self.param_groups]
        saved = [group["params"] for group in meta["groups"]]
        if mine != saved:
            odd = sorted({n for g in mine for n in g} ^ {n for g in saved for n in g})
            raise ValueError(f"optimiser state: expected this model's parameter groups, got others: {odd[:4] or mine}")
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            state.setdefault(name, {})[kind] = value
        groups = [{**group, "betas": tuple(group["betas"])} for group in meta["groups"]]
        for group in groups:
            group["prior_dtype"] = PRIORS[group.get("prior_dtype", "float32")]
        self.load_state_dict({"state": state, "param_groups": groups})


class _Saved:
    """One group of a saved state.

    Attributes:
        settings: what goes into the optimiser's group.
        tensors: of each parameter, without its clock.
        clock: t and a.
    """

    def __init__(self, group: dict, state: dict) -> None:
        self.settings = {"prior_dtype": torch.float32, **{k: v for k, v in group.items() if k not in CLOCK}}
        states = [state.get(i, {}) for i in group["params"]]
        self.tensors = [{key: value for key, value in s.items() if key not in CLOCK} for s in states]
        self.clock = [self._common(name, group, states) for name in CLOCK]

    @staticmethod
    def _common(name: str, group: dict, states: list[dict]) -> float:
        """A number of the clock: the group's, or the one that all its parameters have."""
        found = {float(s[name]) if name in s else None for s in (states if name not in group else [group])}
        if len(found) > 1 or None in found:
            raise ValueError(f"state_dict: expected one {name} for all parameters of a group, got {found or 'none'}")
        return found.pop() if found else 0.0

    def check(self, mine: dict) -> None:
        """Raise where the tensors are not those of the optimiser's group ``mine``."""
        for i, (p, tensors) in enumerate(zip(mine["params"], self.tensors, strict=False)):
            if missing := {"exp_avg", "exp_avg_sq"} - tensors.keys():
                raise ValueError(f"state_dict: expected {' and '.join(sorted(missing))} of parameter {i}, got none")
            for key, value in tensors.items():
                checks.shape(f"state_dict: {key} of parameter {i}", value, *p.shape)
                if sharding(value) != sharding(p):
                    raise ValueError(
                        f"state_dict: {key} of parameter {i}: expected sharding {sharding(p)}, got {sharding(value)}"
                    )
        decay = mine["prior_decay"] or self.settings["prior_decay"]
        if decay and any("prior" not in tensors for tensors in self.tensors):
            raise ValueError(
                f"state_dict: expected a prior for every parameter, because prior_decay is {decay}, "
                "got a state without one; the prior is the weights at the start of the stage and cannot be made anew"
            )


def _check(group: dict) -> None:
    checks.number("lr", float(group["lr"]), 0.0)
    checks.number("eps", group["eps"], 0.0)
    checks.number("weight_decay", group["weight_decay"], 0.0)
    checks.number("prior_decay", group["prior_decay"], 0.0)
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        checks.number(name, beta, 0.0, 1.0, below=True)
    if group["prior_dtype"] not in PRIORS.values():
        raise ValueError(f"prior_dtype: expected torch.float32 or torch.bfloat16, got {group['prior_dtype']}")
    for i, p in enumerate(group["params"]):
        if not local(p).is_contiguous():
            shape, strides = list(p.shape), list(p.stride())
            raise ValueError(f"params[{i}]: expected a contiguous tensor of shape {shape}, got strides {strides}")


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    prior_decay: float = 0.0,
    no_decay: Sequence[str] = NO_DECAY,
) -> list[dict]:
    """Two groups, decayed and not: the latter has every parameter whose name contains a word of ``no_decay``.

    Only parameters that require a gradient; a tied one counts once, under its first name. An empty group is left out.
    """
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if any(word in name for word in no_decay) else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "prior_decay": prior_decay},
        {"params": plain, "weight_decay": 0.0, "prior_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """The learning rate of step 1 to ``total``: linear from peak / warmup to peak, then half a cosine to ``final``.

    Step ``warmup`` runs at ``peak``, step ``total`` at ``final``; later steps stay there. ValueError for step < 1.
    """
    checks.number("step", step, 1)
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
