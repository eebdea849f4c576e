"""Cases of the native harness: inputs of every CPU operator, and its results in fp64 with the errors they allow.

The results are those of the operators' specifications (``dph_kernels/*/reference.py``) in fp64, from the same rounded
inputs; the allowed errors follow the rule of tests/helpers/numerics.py.
"""

import importlib
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers.numerics import FLOOR, tolerance
from torch import Tensor

from dph_kernels import PackedLayout, philox
from dph_kernels.rope_attention import schedule

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {torch.float32: "f", torch.bfloat16: "h", torch.float64: "d", torch.int64: "q", torch.int32: "i"}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """One call of the forward and the backward pass: arrays and numbers by name, and results as they should be."""

    title: str  # the operator comes first
    inputs: dict[str, Tensor | int | float]
    results: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)

    def expect(self, name: str, fp64: Tensor, same_precision: Tensor, terms: Tensor | None = None) -> None:
        """Add a result in fp64, and as plain PyTorch computes it in the precision of the kernel.

        ``terms``: sums of absolute terms, of results that are few sums of terms that cancel.
        """
        floor = FLOOR[same_precision.dtype]
        earned, allowed = tolerance(same_precision, fp64, factor=2.0, floor=floor)
        self.bounds[name] = allowed if terms is None else 2.0 * earned + floor * terms.max().item()
        self.results[name] = fp64.double()

    def expect_exactly(self, name: str, values: Tensor) -> None:
        """Add a result without rounding errors."""
        self.results[name], self.bounds[name] = values.double(), 0.0


def write(path: Path, cases: list[Case]) -> None:
    """Write the file that harness.cpp reads."""
    with path.open("wb") as file:
        for case in cases:
            arrays = dict(case.inputs)
            for name, values in case.results.items():
                arrays[f"= {name}"], arrays[f"~ {name}"] = values, case.bounds[name]
            file.write(text(case.title) + struct.pack("<q", len(arrays)))
            for name, values in arrays.items():
                if not isinstance(values, Tensor):
                    values = torch.tensor(values, dtype=torch.float64 if isinstance(values, float) else torch.int64)
                values = values.detach().reshape(-1).contiguous()
                file.write(text(name) + text(TYPES[values.dtype]) + struct.pack("<q", values.numel()))
                file.write(values.view(torch.uint8).numpy().tobytes())


def text(string: str) -> bytes:
    return struct.pack("<q", len(string)) + string.encode("ascii")


def reference(operator: str):
    return importlib.import_module(f"dph_kernels.{operator}.reference")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def constant(header: str, name: str) -> int:
    """The value of a constant of csrc/."""
    return int(re.search(rf"constexpr \w+ {name} = (\d+);", (CSRC / header).read_text())[1])


def double(x):
    """The same numbers in fp64."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def linear() -> Iterator[Case]:
    for rows, columns, depth in [(1, 1, 1), (1, 40, 64), (3, 7, 5), (5, 33, 67), (8, 35, 131)]:
        for dtype in DTYPES:
            for biased in (False, True):
                x, weight = torch.randn(rows, depth), torch.randn(columns, depth).to(dtype)
                bias = torch.randn(columns) if biased else None
                inputs = {"rows": rows, "columns": columns, "depth": depth, "x": x, "weight": weight}
                if biased:
                    inputs["bias"] = bias
                case = Case(f"linear {rows} x {columns} x {depth}, {name_of(dtype)}, bias {biased}", inputs)
                product = torch.nn.functional.linear
                case.expect("out", product(double(x), double(weight), double(bias)), product(x, weight.float(), bias))
                yield case


def linear_logprob() -> Iterator[Case]:
    """The passes over logits, which are given here: as a product with the identity."""
    for rows, columns, split in [(1, 1, 0), (3, 37, 0), (5, 1100, 0), (1, 1, 1), (3, 37, 10), (5, 2300, 1101)]:
        for statistics in (False, True):
            logits, upstream = 4 * torch.randn(rows, columns), torch.randn(rows)
            targets = torch.randint(columns, (rows,))
            found = {}
            for dtype in (torch.float64, torch.float32):
                x, identity = logits.to(dtype), torch.eye(columns, dtype=dtype)
                forward = reference("linear_logprob").forward(x, identity, targets, statistics)
                gradient, _ = reference("linear_logprob").backward(
                    upstream.to(dtype), x, identity, targets, forward[1], True, False
                )
                found[dtype] = {"logprobs": forward[0], "largest": forward[1][0], "log_sum": forward[1][1]}
                found[dtype] |= {"gradient": gradient, **({"entropy": forward[2]} if statistics else {})}
            title = f"linear_logprob {rows} x {columns} in tiles of {split or columns}, statistics {statistics}"
            inputs = {"rows": rows, "columns": columns, "split": split}
            case = Case(title, inputs | {"logits": logits, "targets": targets, "upstream": upstream})
            for name, truth in found[torch.float64].items():
                case.expect(name, truth, found[torch.float32][name])
            if statistics:
                case.expect_exactly("best", forward[3])
            yield case


def preference_loss() -> Iterator[Case]:
    options = {"beta": 0.3, "dpo_epsilon": 0.1, "dph_epsilon": 0.2, "dpo_weight": 0.7, "dph_weight": 1.3}
    reward_names = "chosen", "rejected"
    logprob_names = "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"
    sizes = [(1, 1, "both"), (5, 3, "rewards"), (300, 1, "logprobs"), (301, 2, "both")]
    sizes.append((4500, 2, "both"))  # several groups of pairs, and enough for wide vectors
    for pairs, heads, parts in sizes:
        for objective in ("separable", "contrastive"):
            for dtype in DTYPES:
                rewards = [torch.randn(heads, pairs).to(dtype) for _ in range(2 if parts != "logprobs" else 0)]
                logprobs = [(40 * torch.randn(pairs)).to(dtype) for _ in range(4 if parts != "rewards" else 0)]
                grad, found = 0.8, {}
                for precision in (torch.float64, torch.float32):
                    loss, metrics, slopes = reference("preference_loss").forward(
                        rewards=[x.T.to(precision) for x in rewards],
                        logprobs=[x.to(precision) for x in logprobs],
                        objective=objective,
                        **options,
                    )
                    found[precision] = {"loss": loss, "metrics": metrics, "slopes": slopes}
                    judged = [x.T for x in rewards] + logprobs[:2]
                    grads = reference("preference_loss").backward(slopes, torch.tensor(grad, dtype=precision), judged)
                    names = (reward_names if rewards else ()) + (logprob_names[:2] if logprobs else ())
                    found[precision] |= {f"d_{name}": x for name, x in zip(names, grads, strict=True)}
                inputs = {"pairs": pairs, "heads": heads, "contrastive": int(objective == "contrastive"), "grad": grad}
                inputs |= options | dict(zip(reward_names, rewards, strict=False))
                inputs |= dict(zip(logprob_names, logprobs, strict=False))
                title = f"preference_loss {pairs} pairs, {heads} heads, {parts}, {objective}, {name_of(dtype)}"
                case = Case(title, inputs)
                for name, truth in found[torch.float64].items():
                    case.expect(name, truth, found[torch.float32][name])
                yield case


def residual_norm() -> Iterator[Case]:
    for tokens, heads, columns in [(2, 1, 5), (3, 1, 67), (37, 2, 33)]:
        for kind, biased in [("layer", False), ("layer", True), ("rms", False)]:
            for updated in (False, True):
                for dtype in DTYPES:
                    yield one_residual_norm((tokens, heads, columns), kind, biased, updated, dtype)


def one_residual_norm(shape: tuple[int, int, int], kind: str, biased: bool, updated: bool, dtype: torch.dtype) -> Case:
    x, update, d_normed, d_total = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    bias, update, d_total = bias if biased else None, update if updated else None, d_total if updated else None
    found = {}
    for precision in (torch.float64, dtype):
        arguments = [None if y is None else y.to(precision) for y in (x, update, weight, bias)]
        total, normed, moments = reference("residual_norm").forward(*arguments, 1e-5, kind)
        source = total if updated else arguments[0]
        needs = True, True, biased
        upstream = [None if y is None else y.to(precision) for y in (d_total, d_normed)]
        grads = reference("residual_norm").backward(*upstream, source, arguments[2], moments, needs)
        found[precision] = {"normed": normed, "rstd": moments[-1], "d_x": grads[0], "d_weight": grads[1]}
        if updated:
            found[precision]["total"] = total
        if kind == "layer":
            found[precision]["mean"] = moments[0]
        if biased:
            found[precision]["d_bias"] = grads[2]
    inputs = {"rows": shape[0] * shape[1], "heads": shape[1], "columns": shape[2], "rms": int(kind == "rms")}
    inputs |= {"eps": 1e-5, "x": x, "weight": weight, "d_normed": d_normed}
    inputs |= {"bias": bias} if biased else {}
    inputs |= {"update": update, "d_total": d_total} if updated else {}
    case = Case(f"residual_norm {shape}, {kind}, bias {biased}, update {updated}, {name_of(dtype)}", inputs)
    for name, truth in found[torch.float64].items():
        case.expect(name, truth, found[dtype][name])
    return case


def swiglu() -> Iterator[Case]:
    chunk = constant("swiglu.h", "SWIGLU_CHUNK")
    wanted = {"both": ("d_projected", "sums"), "projected": ("d_projected",), "sums": ("sums",)}
    for rows, columns in [(1, 1), (3, 7), (37, 33)]:
        for dtype in DTYPES:
            for needed, names in wanted.items():
                projected, grad = (2 * torch.randn(rows, 2 * columns)).to(dtype), torch.randn(rows, columns).to(dtype)
                bias = torch.randn(2 * columns)
                found = {}
                for precision in (torch.float64, torch.float32):
                    wide = [y.to(precision) for y in (projected, bias)]
                    rounded = precision if precision == torch.float64 else dtype
                    results = {"out": reference("swiglu").forward(*wide).to(rounded)}
                    pieces = [y.split(chunk) for y in (grad.to(precision), wide[0])]
                    steps = [
                        reference("swiglu").backward(some_grad, some, wide[1], True, True)
                        for some_grad, some in zip(*pieces, strict=True)
                    ]
                    results["d_projected"] = torch.cat([d_projected for d_projected, _ in steps]).to(rounded)
                    results["sums"] = torch.stack([sums for _, sums in steps])
                    found[precision] = results
                inputs = {"rows": rows, "columns": columns, "projected": projected, "bias": bias, "grad": grad}
                case = Case(f"swiglu {rows} x {columns}, gradients: {needed}, {name_of(dtype)}", inputs)
                for name in ("out", *names):
                    case.expect(name, found[torch.float64][name], found[torch.float32][name])
                yield case


def swiglu_reward() -> Iterator[Case]:
    # Rows, columns, width (0: no w1; None: neither w1 nor w2), heads.
    few = [(1, 33, 35, 1), (2, 36, 0, 2), (4, 37, 64, 3), (7, 70, 41, 1), (5, 19, None, 2)]
    for size in [*few, (19, 40, 0, 1), (37, 45, 67, 2), (33, 300, 270, 1)]:
        for dtype in DTYPES:
            for turned in (False, True):
                yield one_swiglu_reward(size, dtype, turned, dropout=0.3 if turned else 0.0)


def one_swiglu_reward(size: tuple, dtype: torch.dtype, turned: bool, dropout: float) -> Case:
    rows, columns, width, heads = size
    depth = width or columns
    shapes = {"hidden": (rows, columns), "reward": (heads, columns)}
    if width:
        shapes |= {"w1": (2 * width, columns), "b1": (2 * width,)}
    if width is not None:
        shapes |= {"w2": (columns, depth), "b2": (columns,)}
    tensors = {name: (torch.randn(shape) / math.sqrt(shape[-1])).to(dtype) for name, shape in shapes.items()}
    tensors["hidden"] = torch.randn(rows, columns).to(dtype)
    grad, row_ids, seed = torch.randn(rows, heads), torch.randint(2**40, (rows,)), 1234567890123
    drops = dropout, dropout / 2  # of the pooled state, of the input
    names = "hidden", "reward", "w1", "b1", "w2", "b2"
    needs = [name in tensors for name in names]
    found = {}
    for precision in (torch.float64, dtype):
        given = [tensors[name].to(precision) if name in tensors else None for name in names]
        hidden, reward, w1, _, w2, _ = given
        forward = reference("swiglu_reward").forward(*given, row_ids, *drops, seed, True)
        upstream = grad.to(forward[0].dtype)
        grads = reference("swiglu_reward").backward(
            upstream, hidden, reward, w1, w2, row_ids, *forward[1:], *drops, seed, needs
        )
        named = zip(names, grads, strict=True)
        if precision == torch.float64:
            states = hidden if w2 is None else forward[2].view(rows, columns)
            terms = states.abs() @ reward.abs().T
        found[precision] = {"rewards": forward[0]} | {f"d_{name}": x for name, x in named if name in tensors}
    inputs = {"rows": rows, "columns": columns, "width": width or 0, "heads": heads, "turned": int(turned)}
    inputs |= {"grad": grad, "row_ids": row_ids, "seed": seed}
    inputs |= {name: x.T if turned and name in ("w1", "w2") else x for name, x in tensors.items()}
    for name, fraction, stream in zip(("pooled", "input"), drops, (philox.POOLED, philox.INPUT), strict=True):
        inputs[f"{name}_threshold"] = philox.threshold(fraction)
        inputs[f"{name}_stream"], inputs[f"{name}_keep"] = stream, 1.0 - fraction
    title = f"swiglu_reward {rows} x {columns}, width {width}, {heads} heads, {name_of(dtype)}, turned {turned}"
    case = Case(title, inputs)
    for name, truth in found[torch.float64].items():
        case.expect(name, truth, found[dtype][name], terms if name == "rewards" else None)
    return case


def laprop() -> Iterator[Case]:
    for grad_dtype in DTYPES:
        for prior_dtype in (None, *DTYPES):
            for copied in (False, True):
                yield one_laprop(grad_dtype, prior_dtype, copied)


def one_laprop(grad_dtype: torch.dtype, prior_dtype: torch.dtype | None, copied: bool) -> Case:
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "prior_decay": 0.2}
    settings |= {"bias_correction": 0.5, "momentum_scale": 1.2}
    sizes, max_norm = (1, 37, constant("laprop.h", "LAPROP_CHUNK") + 21), 3.0
    params, grads, exp_avg, priors = ([torch.randn(size) for size in sizes] for _ in range(4))
    exp_avg_sq = [torch.rand(size) for size in sizes]
    grads = [x.to(grad_dtype) for x in grads]
    priors = [x.to(prior_dtype) for x in priors] if prior_dtype else []
    clock = torch.tensor([3.0, 0.008], dtype=torch.float64)  # steps, average of the learning rates
    norm, scale, finite = reference("laprop").gradient_norm(grads, max_norm)
    found = {}
    for precision in (torch.float64, torch.float32):
        state = [[x.to(precision, copy=True) for x in tensors] for tensors in (params, exp_avg, exp_avg_sq)]
        copies = [x.to(torch.bfloat16 if precision == torch.float32 else precision) for x in params if copied]
        time = clock.clone()
        arguments = state[0], grads, *state[1:], priors, copies, scale.to(precision), time, None
        reference("laprop").forward(*arguments, **settings)
        found[precision] = {
            f"{name} {i}": x
            for name, tensors in zip(("param", "exp_avg", "exp_avg_sq", "copy"), (*state, copies), strict=True)
            for i, x in enumerate(tensors)
        }
    inputs = {"tensors": len(sizes), "max_norm": max_norm, "clock": clock} | settings
    columns = {"param": params, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grads, "prior": priors}
    inputs |= {f"{name} {i}": x for name, tensors in columns.items() for i, x in enumerate(tensors)}
    prior = name_of(prior_dtype) if prior_dtype else "none"
    case = Case(f"laprop gradients {name_of(grad_dtype)}, prior {prior}, copy {copied}", inputs)
    for name, truth in found[torch.float64].items():
        case.expect(name, truth, found[torch.float32][name])
    case.expect("norm", norm, norm)
    case.expect("scale", scale.double(), scale)
    case.expect_exactly("finite", finite)
    case.expect("clock", time, time)
    return case


def attention() -> Iterator[Case]:
    layouts = {
        "documents": PackedLayout.documents([5, 0, 33, 1, 70]),
        "memory": PackedLayout.with_memory([65, 1, 0, 7], [3, 40, 8, 0], 40),
        "branches": PackedLayout.shared_prefix([7, 0, 65], [[3, 1], [4, 4], [9, 0, 2]]),
        "decode": PackedLayout.decode([64, 0, 5], [[1, 3, 9], [2], []], 9),
    }
    for name, layout in layouts.items():
        for heads, key_heads, head_dim, dtype in [
            (2, 2, 20, torch.float32), (4, 2, 64, torch.float32), (3, 1, 32, torch.bfloat16)
        ]:  # fmt: skip
            yield one_attention(name, layout, heads, key_heads, head_dim, dtype)


def one_attention(
    name: str, layout: PackedLayout, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype
) -> Case:
    queries, keys, memory = layout.queries, layout.keys, layout.memory
    q, grad = (torch.randn(queries, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(keys, key_heads, head_dim).to(dtype) for _ in range(2))
    memory_k, memory_v = (torch.randn(memory, key_heads, head_dim).to(dtype) for _ in range(2))
    tables = []
    for rows in (queries, keys):
        angles = 100 * torch.rand(rows, head_dim // 2)
        tables += [angles.cos(), angles.sin()]
    scale, segments = head_dim**-0.5, layout.segments
    found = {}
    for precision in (torch.float64, dtype):
        given = [x.to(precision) for x in (q, k, v, memory_k, memory_v)]
        wide = [x.to(torch.promote_types(precision, torch.float32)) for x in tables]
        out, lse, rotated = reference("rope_attention").forward(*given, segments, *wide, scale)
        grads = reference("rope_attention").backward(
            grad.to(precision), given[0], rotated, *given[2:], out, lse, segments, *wide, scale
        )
        results = {"out": out, "lse": lse / math.log(2), "rotated": rotated}
        found[precision] = results | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    tile_rows = constant("attention.h", "ATTENTION_ROWS") // (heads // key_heads)
    sizes = {"rows": tile_rows, "block": constant("attention.h", "ATTENTION_BLOCK"), "device": torch.device("cpu")}
    content = schedule.content_of(segments)
    forward = schedule.by_queries(content, queries, memory, **sizes)
    backward, tasks = schedule.by_component(content, queries, memory, **sizes)
    inputs = {"keys": keys, "memory": memory, "heads": heads, "key_heads": key_heads, "head_dim": head_dim}
    inputs |= {"parts": heads // key_heads, "scale": scale, "q": q, "k": k, "v": v, "grad": grad}
    inputs |= {"memory_k": memory_k, "memory_v": memory_v}
    inputs |= dict(zip(("q_cos", "q_sin", "k_cos", "k_sin"), tables, strict=True))
    inputs |= {"bounds": schedule.bounds(content, queries, device=torch.device("cpu")), "backward_tasks": tasks}
    inputs |= {"forward_tiles": forward.tiles, "forward_runs": forward.runs}
    inputs |= {"backward_tiles": backward.tiles, "backward_runs": backward.runs}
    case = Case(f"attention {name}, {heads} and {key_heads} heads of {head_dim}, {name_of(dtype)}", inputs)
    for result, truth in found[torch.float64].items():
        case.expect(result, truth, found[dtype][result])
    return case


OPERATORS = (attention, laprop, linear, linear_logprob, preference_loss, residual_norm, swiglu, swiglu_reward)


def all_cases() -> list[Case]:
    """All cases of all operators."""
    return [case for operator in OPERATORS for case in operator()]
