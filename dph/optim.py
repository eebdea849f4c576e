"""LaProp with decoupled prior regularisation, parameter groups, clipping and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

import dph_kernels
from dph_kernels import checks

NO_DECAY = ("norm", "bias", "embedding")


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

    ``params`` are parameters or groups (``param_groups``); a group may override lr, betas, eps and both decays.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        prior_decay: float = 0.0,
    ) -> None:
        """Take the priors.

        ValueError for a rate, eps or decay below 0, a beta outside [0, 1), and a parameter that is not contiguous.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "prior_decay": prior_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group: its state starts here, and so does its prior."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group.setdefault("step", 0)
        group.setdefault("rate_average", 0.0)  # a of the equations
        for p in group["params"]:
            kind = _state_dtype(p)
            state = self.state[p]
            state["exp_avg"] = torch.zeros_like(p, dtype=kind, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=kind, requires_grad=False)
            if p.dtype != kind:
                state["master"] = p.detach().to(kind)
            if group["prior_decay"] != 0:
                state["prior"] = p.detach().to(kind, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, grad_scale: Tensor | None = None) -> Tensor | None:
        """One update. ``grad_scale``, one element on the same device, multiplies every gradient as it is read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group, grad_scale)
        return loss

    def _update(self, group: dict, grad_scale: Tensor | None) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        group["step"] += 1
        group["rate_average"] = beta1 * group["rate_average"] + (1 - beta1) * lr
        settings = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "prior_decay": group["prior_decay"],
            "bias_correction": math.sqrt(1 - beta2 ** group["step"]),
            "momentum_scale": lr / group["rate_average"] if lr != 0 else 1.0,
            "grad_scale": grad_scale,
        }
        for part in self._by_precision(params):
            self._launch(part, settings)

    def _by_precision(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """One list per dtype: nearly always a single one."""
        for kind in dict.fromkeys(p.dtype for p in params):
            yield [p for p in params if p.dtype == kind]

    def _launch(self, params: list[Tensor], settings: dict) -> None:
        state = [self.state[p] for p in params]
        anchored = settings["prior_decay"] != 0
        if anchored and any("prior" not in s for s in state):
            raise ValueError("prior_decay: was 0 when the optimiser was built, so there is no prior to decay towards")
        lowered = "master" in state[0]
        dph_kernels.laprop(
            [s["master"] for s in state] if lowered else params,
            [p.grad.contiguous() for p in params],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [s["prior"] for s in state] if anchored else None,
            copies=params if lowered else None,
            **settings,
        )

    def lower(self, dtype: torch.dtype) -> None:
        """Keep the fp32 weights as masters and turn the parameters into ``dtype`` (bf16); gradients gather in fp32."""
        for p in self._parameters():
            self.state[p].setdefault("master", p.detach())
            p.data = p.data.to(dtype)
            p.grad_dtype = torch.float32

    def restore(self) -> None:
        """The opposite of ``lower``: parameters become their fp32 masters again."""
        for p in self._parameters():
            if "master" in self.state[p]:
                p.grad = None
                p.data = self.state[p].pop("master")

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what ``state_dict`` gave.

        ValueError where a shape differs, and where a group decays towards a prior that the state lacks.
        """
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for place, (p, i) in enumerate(zip(self._parameters(), saved_ids, strict=False)):
            for key, value in state_dict["state"].get(i, {}).items():
                checks.shape(f"state_dict: {key} of parameter {place}", value, *p.shape)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            anchored = mine["prior_decay"] != 0 or saved["prior_decay"] != 0
            if anchored and any("prior" not in state_dict["state"].get(i, {}) for i in saved["params"]):
                raise ValueError(
                    "state_dict: expected a prior for every parameter, because prior_decay is "
                    f"{mine['prior_decay'] or saved['prior_decay']}, got a state without one; "
                    "the prior is the weights at the start of the stage and cannot be made anew"
                )
        super().load_state_dict(state_dict)
        # The base class casts state to the parameter's dtype, which would round the fp32 state of bf16 parameters.
        for p, i in zip(self._parameters(), saved_ids, strict=True):
            saved = state_dict["state"].get(i, {})
            self.state[p] = {key: value.detach().to(p.device, copy=True) for key, value in saved.items()}
            if p.dtype == _state_dtype(p):
                self.state[p].pop("master", None)
            elif "master" not in saved:
                self.state[p]["master"] = p.detach().to(_state_dtype(p))

    def weights(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Every parameter in full precision, by the names of ``names``: its master where it has one."""
        return {names[p]: self.state[p].get("master", p.detach()) for p in self._parameters()}

    def to_tensors(self, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict]:
        """The state as flat tensors and a JSON-ready dictionary, for safetensors; masters are in ``weights``."""
        state = {names[p]: self.state[p] for p in self._parameters()}
        tensors = {f"{name}/{key}": s[key] for name, s in state.items() for key in s if key != "master"}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in self.param_groups]
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
        self.load_state_dict({"state": state, "param_groups": groups})


def _check(group: dict) -> None:
    checks.number("lr", group["lr"], 0.0)
    checks.number("eps", group["eps"], 0.0)
    checks.number("weight_decay", group["weight_decay"], 0.0)
    checks.number("prior_decay", group["prior_decay"], 0.0)
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        checks.number(name, beta, 0.0, 1.0, below=True)
    for i, p in enumerate(group["params"]):
        if not p.is_contiguous():
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


@torch.no_grad()
def global_norm(params: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: an fp64 scalar on their device, without a wait for it."""
    norms = [norm for p in params if p.grad is not None for norm in _row_norms(p.grad)]
    return torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros((), dtype=torch.float64)


def _row_norms(grad: Tensor, row: int = 1024) -> tuple[Tensor, Tensor]:
    """Norms of runs of ``row`` elements and of what is left over, in fp64.

    PyTorch sums a whole tensor on the CPU in fp32 lanes, 0.1% off at 20M elements, or 70 times slower in fp64; short
    fp32 rows whose norms are combined in fp64 are exact to 1e-9 and cost nothing (2.9 ms, 2 cores).
    """
    flat, kind = grad.reshape(-1), torch.promote_types(grad.dtype, torch.float32)
    whole = flat.numel() // row * row
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, row), dim=1, dtype=kind).double()
    return rows, torch.linalg.vector_norm(flat[whole:], dtype=kind).double().reshape(1)


def clip_coefficient(norm: Tensor, limit: float) -> Tensor:
    """min(1, limit / norm) as one fp32 element on ``norm``'s device, for ``LaProp.step(grad_scale=...)``."""
    return (limit / (norm + 1e-6)).clamp(max=1.0).float().reshape(1)


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """The learning rate of step 1 to ``total``: linear from peak / warmup to peak, then half a cosine to ``final``.

    Step ``warmup`` runs at ``peak``, step ``total`` at ``final``; later steps stay there. ValueError for step < 1.
    """
    checks.number("step", step, 1)
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
