"""Checks of LaProp's settings and parameters, and the states it loads."""

import copy
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dph.errors import shown
from dph_kernels import checks, dispatch

SETTINGS = ("lr", "betas", "eps", "weight_decay", "prior_decay")
CLOCK = ("step", "rate_average")  # values of a group's clock: t and a of LaProp's equations
PRIOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")  # in parameters' names
BY_POSITION = "to load it by position, delete 'param_names' from the groups of the state"


# Settings


def check_settings(settings: dict[str, Any], prefix: str = "", *, read_rate: bool = True) -> None:
    """Check rate, betas, eps and decays; names in messages begin with ``prefix``.

    ``read_rate=False`` leaves the value of a rate on a GPU, or in a recorded step, unread: that would wait for the
    device.

    Raises:
        TypeError: a value is no number, or ``betas`` is not two of them.
        ValueError: a number is negative, infinite or NaN, or a beta is 1 or more.
    """
    rate, name = settings["lr"], f"{prefix}lr"
    if isinstance(rate, Tensor):
        checks.dtype(name, rate, (torch.float32, torch.float64))
        checks.shape(name, rate.reshape(-1), 1)
        if read_rate or (rate.device.type == "cpu" and dispatch.can_bypass_dispatcher([rate])):
            _check_number(name, float(rate))
    else:
        _check_number(name, rate)
    betas = settings["betas"]
    if not isinstance(betas, tuple | list):
        raise TypeError(f"{prefix}betas: expected two numbers, got {shown(betas)} of type {type(betas).__name__}")
    if len(betas) != 2:
        raise ValueError(f"{prefix}betas: expected two numbers, got {len(betas)}: {shown(betas)}")
    for i, beta in enumerate(betas):
        _check_number(f"{prefix}betas[{i}]", beta, below=1)
    for key in ("eps", "weight_decay", "prior_decay"):
        _check_number(f"{prefix}{key}", settings[key])


def convert_settings(group: dict[str, Any], prefix: str) -> None:
    """Check the settings of a group, and convert them in place: numbers to float, the dtype of the priors to its name.

    A rate that is a tensor stays one. Raises as ``check_settings`` and ``prior_dtype_name``.
    """
    check_settings(group, prefix)
    group["prior_dtype"] = prior_dtype_name(group["prior_dtype"], prefix)
    group["betas"] = tuple(map(float, group["betas"]))
    for key in ("lr", "eps", "weight_decay", "prior_decay"):
        if not isinstance(group[key], Tensor):
            group[key] = float(group[key])


def _check_number(name: str, value: object, below: int | None = None) -> None:
    """Require a finite number of at least 0, less than ``below``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {shown(value)} of type {type(value).__name__}")
    try:
        fits = 0.0 <= float(value) < (below or math.inf)  # False for NaN
    except OverflowError:  # an integer
        fits = False
    if not fits:
        raise ValueError(f"{name}: expected a number in [0, {below or 'inf'}), got {shown(value)}")


def prior_dtype_name(value: object, prefix: str = "") -> str:
    """Return "float32" or "bfloat16" for a dtype of PyTorch's or its name; the groups of a state contain the name.

    PyTorch's distributed checkpoints refuse dtypes in groups.
    """
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype | str) else None
    if name not in PRIOR_DTYPES:
        message = f"{prefix}prior_dtype: expected torch.float32 or torch.bfloat16, got {shown(value)}"
        raise TypeError(message) if name is None else ValueError(message)
    return name


# Parameters and their gradients


def with_name(place: str, group: dict[str, Any], i: int) -> str:
    """Return ``place`` followed by the name of the group's parameter ``i``, if it is known, for a message."""
    names = group.get("param_names") or ()
    return f"{place} ({shown(names[i])})" if i < len(names) else place


def check_params(group: dict[str, Any], prefix: str) -> None:
    """Check the parameters of a group, and that they have one name each or none.

    Raises:
        TypeError: a parameter is not floating-point, or a name no string.
        ValueError: a parameter is sparse, not contiguous, made in inference mode, or there twice.
    """
    params = group["params"]
    check_names(group.get("param_names"), len(params), prefix)
    places: dict[Tensor, int] = {}
    for i, p in enumerate(params):
        name = with_name(f"{prefix}params[{i}]", group, i)
        if p.dtype not in checks.FLOATS:
            allowed = ", ".join(map(str, checks.FLOATS))
            raise TypeError(f"{name}: expected one of {allowed}, got {p.dtype}")
        if p.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got one in {p.layout}")
        if p.is_inference():
            raise ValueError(f"{name}: expected a tensor made outside of torch.inference_mode(), got one made inside")
        if not (p.to_local() if hasattr(p, "to_local") else p).is_contiguous():
            shape, strides = list(p.shape), list(p.stride())
            raise ValueError(f"{name}: expected a contiguous tensor of shape {shape}, got strides {strides}")
        if places.setdefault(p, i) != i:
            raise ValueError(f"{name}: expected every parameter once, got the one of params[{places[p]}] again")


def check_names(names: object, count: int, prefix: str) -> None:
    """Require a list of ``count`` strings, or None. TypeError for other types, ValueError for another count."""
    if names is None:
        return
    if not isinstance(names, list | tuple):
        raise TypeError(f"{prefix}param_names: expected a list of names, got {shown(names)}")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"{prefix}param_names[{i}]: expected a name, got {shown(name)}")
    if len(names) != count:
        raise ValueError(f"{prefix}param_names: expected {count} names, got {len(names)}")


def check_grad_scale(grad_scale: object) -> None:
    """Require a plain tensor; the operator checks its shape, dtype and device."""
    if not isinstance(grad_scale, Tensor):
        got = f"{shown(grad_scale)} of type {type(grad_scale).__name__}"
        raise TypeError(f"grad_scale: expected a float32 tensor of one element, got {got}")
    if sharding(grad_scale) is not None:
        raise ValueError("grad_scale: expected a plain tensor, got a DTensor (take its full_tensor())")


def misfit_error(name: str, p: Tensor, state: dict[str, Any], *, is_known: bool) -> ValueError:
    """Return the error of a parameter that was cast or moved (``is_known``), or exchanged, since the last step."""
    kind = "a DTensor" if sharding(p) else "a tensor"
    got = f"{kind} of shape {list(p.shape)}, {p.dtype}, on {p.device}"
    if not is_known:
        return ValueError(
            f"{name}: expected the parameter that the state belongs to, got {got}: it was exchanged or reshaped since "
            "the last step; build a new optimizer of the model's present parameters, and load a state into it"
        )
    dtype = "torch.bfloat16 or torch.float16" if "master" in state else state["exp_avg"].dtype
    return ValueError(
        f"{name}: expected {dtype} on {state['exp_avg'].device} as at the last step, got {got}: it was cast or moved; "
        "the state follows with optimizer.load_state_dict(optimizer.state_dict())"
    )


def sharding(tensor: Tensor) -> tuple | None:
    """Return mesh and placements of a sharded tensor (DTensor); None for a plain one."""
    return (tensor.device_mesh, tuple(tensor.placements)) if hasattr(tensor, "to_local") else None


# States


def adapted(p: Tensor, entries: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a copy of a parameter's state, without its clock, in ``dtype`` and on the parameter's device.

    A prior in bf16 stays so. A parameter of another dtype gets a master, if there is none; one of ``dtype`` needs none.
    """
    state = {}
    for key, value in entries.items():
        is_rounded_prior = key == "prior" and value.dtype == torch.bfloat16
        if key not in CLOCK and (key != "master" or p.dtype != dtype):
            own_dtype = value.dtype if is_rounded_prior else dtype
            state[key] = value.detach().to(p.device, own_dtype, copy=True).contiguous()
    if p.dtype != dtype and "master" not in state:
        state["master"] = p.detach().to(dtype)
    return state


def merged(weight: Tensor, master: Tensor, former: Sequence[torch.dtype] = ()) -> Tensor:
    """Return the master on the weight's device, with the weight's values in the elements that were written there.

    Those differ from the master as it is rounded, directly or to a dtype of ``former`` before the parameter was cast.
    The result has the wider dtype of both. Does not wait for the device.
    """
    master = master.to(weight.device)
    is_kept = weight == master.to(weight.dtype)
    for dtype in former:
        is_kept |= weight == master.to(dtype).to(weight.dtype)
    return torch.where(is_kept, master, weight)


class SavedGroup:
    """One group of a saved state, which fits a group of the optimizer.

    Attributes:
        settings: entries of the optimizer's group, except the parameters.
        tensors: state of each parameter, without its clock; None if a frozen one has none.
        clock: t and a; both 0 if no parameter has a state.
    """

    def __init__(self, number: int, group: dict[str, Any], state: dict[Any, dict[str, Any]], own: dict) -> None:
        """Read ``group``. TypeError or ValueError unless it fits ``own``, the group of the optimizer."""
        self._name = f"state_dict: param_groups[{number}]"
        if not isinstance(group, dict):
            raise TypeError(f"{self._name}: expected a dictionary, got {shown(group)}")
        for key in ("params", *SETTINGS):
            if key not in group:
                raise ValueError(f"{self._name}: expected {key}, got none")
        self.settings = copy.deepcopy({key: value for key, value in group.items() if key not in (*CLOCK, "params")})
        self.settings.setdefault("prior_dtype", "float32")  # older states
        convert_settings(self.settings, f"{self._name}: ")
        self.settings["lr"] = float(self.settings["lr"])

        self._keys, params = group["params"], own["params"]
        if not isinstance(self._keys, list | tuple):
            raise TypeError(f"{self._name}: params: expected a list of numbers or names, got {shown(self._keys)}")
        for i, key in enumerate(self._keys):
            if not isinstance(key, int | str):
                raise TypeError(f"{self._name}: params[{i}]: expected a number or a name, got {shown(key)}")
        if len(params) != len(self._keys):
            raise ValueError(f"{self._name}: expected the state of {len(params)} parameters, got {len(self._keys)}")
        check_names(self.settings.get("param_names"), len(params), f"{self._name}: ")
        self._check_names(own.get("param_names"))
        states = [state.get(key) or {} for key in self._keys]
        for i, entries in enumerate(states):
            if not isinstance(entries, dict):
                place = f"state_dict: state of {with_name(f'parameter {i}', own, i)}"
                raise TypeError(f"{place}: expected a dictionary, got {shown(entries)}")
        # Distributed checkpoints leave the state of frozen parameters out, or replace it by that of a new optimizer.
        counting = [entries for entries, p in zip(states, params, strict=True) if entries and p.requires_grad]
        self.clock = self._read_clock(group, counting or [entries for entries in states if entries])
        decay = own["prior_decay"] or self.settings["prior_decay"]
        self.tensors: list[dict[str, Tensor] | None] = []
        for i, (p, entries) in enumerate(zip(params, states, strict=True)):
            if entries or p.requires_grad:
                self.tensors.append(_read_tensors(with_name(f"parameter {i}", own, i), p, entries, decay))
            else:
                self.tensors.append(None)

    def _read_clock(self, group: dict[str, Any], states: list[dict[str, Any]]) -> list[float]:
        """Return t and a: the group's number, or the one that all its parameters share."""
        clock = []
        for key in CLOCK:
            values: set[float | None] = set()
            for holder in [group] if key in group else states:
                value = holder.get(key)
                if isinstance(value, Tensor) and value.numel() == 1:
                    value = value.item()
                if value is not None:
                    _check_number(f"{self._name}: {key}", value)
                values.add(value)
            if len(values) > 1 or None in values:
                got = values if len(values) <= 4 else f"{len(values)} different ones"
                raise ValueError(f"state_dict: expected one {key} for all parameters of a group, got {got}")
            clock.append(float(values.pop()) if values and states else 0.0)
        return clock

    def _check_names(self, own: list[str] | None) -> None:
        """Compare names, if both sides have them: tensors of one shape would fit in any order.

        The keys of PyTorch's distributed checkpoints are names. Their order is that of this optimizer, whereas
        ``param_names`` keeps the order of the saved one.
        """
        saved = self.settings.get("param_names")
        if all(isinstance(key, str) for key in self._keys):
            saved = self._keys
            if "param_names" in self.settings:
                self.settings["param_names"] = list(own or saved)
        elif own and not saved:
            self.settings["param_names"] = own
        for i, (mine, theirs) in enumerate(zip(own or (), saved or (), strict=False)):
            if _bare(mine) != _bare(theirs):
                raise ValueError(
                    f"{self._name}: expected the state of {shown(mine)} as parameter {i}, got that of {shown(theirs)}: "
                    f"the parameters are others or in another order; {BY_POSITION}"
                )


def saved_groups(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> list[SavedGroup]:
    """Return the groups of a saved state. TypeError or ValueError unless they fit the optimizer's ``groups``."""
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(key), kind):
            got = shown(state_dict.get(key)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise TypeError(f"state_dict: expected a dictionary with {key}, a {kind.__name__}, got {got}")
    if len(state_dict["param_groups"]) != len(groups):
        got = len(state_dict["param_groups"])
        raise ValueError(f"state_dict: expected {len(groups)} groups of parameters, got {got}")
    saved = []
    for number, (own, group) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        saved.append(SavedGroup(number, group, state_dict["state"], own))
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    known = set(keys)
    if len(known) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"state_dict: params: expected every parameter once, got {shown(twice)} {keys.count(twice)} times"
        )
    for key in state_dict["state"]:
        if key not in known:
            raise ValueError(
                f"state_dict: expected states of the groups' parameters, got one of parameter {shown(key)}"
            )
    return saved


def compare_groups(own: list[list[str]], saved: list[list[str]]) -> None:
    """Raise ValueError unless both have the same groups of names, each in any order."""
    if len(own) != len(saved):
        raise ValueError(f"optimizer state: expected {len(own)} groups of parameters, got {len(saved)}")
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        if missing := sorted(set(mine) - set(theirs)):
            difference = f"{len(missing)} of its parameters are missing, first {shown(missing[0])}"
        elif unknown := sorted(set(theirs) - set(mine)):
            difference = f"{len(unknown)} unknown parameters, first {shown(unknown[0])}"
        else:
            continue
        raise ValueError(
            f"optimizer state: expected this model's parameter groups, got others: group {number}: {difference}"
        )


def _read_tensors(name: str, p: Tensor, entries: dict[str, Any], prior_decay: float) -> dict[str, Tensor]:
    """Return a parameter's state without t and a.

    TypeError if a key is no string; ValueError unless all tensors are there and fit the parameter.
    """
    tensors = {}
    for key, value in entries.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: state of {name}: expected names as keys, got {shown(key)}")
        is_missing = isinstance(value, dict) and not value  # how PyTorch reads a flattened state
        if key not in CLOCK and not is_missing:
            tensors[key] = value
    if missing := {"exp_avg", "exp_avg_sq"} - tensors.keys():
        raise ValueError(f"state_dict: expected {' and '.join(sorted(missing))} of {name}, got none")
    for key, value in tensors.items():
        place = f"state_dict: {key} of {name}"
        checks.tensor(place, value)
        checks.memory(place, value)
        if value.is_meta and not p.is_meta:
            raise ValueError(f"{place}: expected a tensor on a device, got one on meta")
        checks.shape(place, value, *p.shape)
        checks.dtype(place, value, checks.FLOATS)
        if sharding(value) != sharding(p):
            raise ValueError(f"{place}: expected sharding {sharding(p)}, got {sharding(value)}")
    if prior_decay and "prior" not in tensors:
        raise ValueError(
            f"state_dict: expected a prior for every parameter, because prior_decay is {prior_decay}, "
            f"got none of {name}; the prior is the weights at the start of the stage and cannot be recovered"
        )
    return tensors


def _bare(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers such as torch.compile and DDP."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
