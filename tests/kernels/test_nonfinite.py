"""NaN, infinities and the largest numbers in any input: every operator and backend against plain PyTorch.

Numbers are put at random places of the inputs and of the upstream gradients; then each element of the results and of
the gradients is compared with plain PyTorch in fp64 and fp32, and for half precision in that, too, from the same
rounded inputs. Each of these gives a candidate, rounded to the result's dtype (which may overflow). The rule:

- An element is right if it equals a candidate: both NaN, both the same infinity, or both finite and close (TOLERANCE,
  relative to the candidate plus the largest element of that result without the injected numbers). So where fp64 and
  fp32 agree, there is one right answer, and where a product overflows in fp32 only, either.
- If an fp32 candidate is NaN or infinite and fp64's is finite, a sum has overflowed: the order of the sum, which
  differs between implementations, decides between NaN and the infinities, so each of them is right. The order also
  decides whether a sum overflows of which the result is near the limit, above 2 % of it.
- In gradients, if infinities were injected, a NaN is right for an infinity and an infinity for a NaN, not for its
  opposite: autograd adds infinities of both signs that a formula written by hand does not contain. Neither is right for
  a finite number, nor a finite number for one of them.
- In gradients that a large finite number reaches, rounding errors are relative to that number (LARGE): the differences
  in which they cancel need not be close. Differences of equal numbers are exactly 0, other than in attention on a
  GPU, whose matrix units sum in an order of their own. And a large query or key makes attention select one value:
  rounding keys to half precision may select another.
- In attention the truth is each query with its visible keys alone, and the kernel for the CPU has to equal that. A mask
  over all keys multiplies NaN and infinities by probabilities of 0, and so reaches pairs that do not see each other:
  the other backends may do so within a tile or a document.
"""

import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from helpers import attention, poolers, preferences
from helpers.numerics import implementations, skip_where_unsupported

from dph_kernels import (
    PackedLayout,
    Rotary,
    gradient_norm,
    laprop,
    linear_logprob,
    native,
    philox,
    preference_loss,
    residual_norm,
    rope_attention,
    swiglu,
    swiglu_reward,
)
from dph_kernels.preference_loss.reference import metric_names

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LARGE = {torch.float32: 3e38, torch.float16: 65504.0, torch.bfloat16: 3.3e38}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An operator on inputs of one kind.

    Attributes:
        make: returns the inputs by name, without injected numbers.
        ours: ``(backend=, **inputs) -> results``; those that require a gradient come first.
        plain: the same in plain PyTorch, in the dtype of its inputs.
        also: another form that is right for other backends than "cpu".
        dtypes: of the inputs.
        prepare: ``(monkeypatch, backend, dtype)``, called before the first call.
    """

    operator: str
    make: Callable
    ours: Callable
    plain: Callable
    also: Callable | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    prepare: Callable | None = None


def random_inputs(**shapes):
    return lambda: {name: torch.randn(shape) for name, shape in shapes.items()}


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# swiglu and residual_norm


def plain_swiglu(projected, bias):
    x, gate = (projected + bias).chunk(2, -1)
    return (x * torch.nn.functional.silu(gate),)


def plain_norm(x, update, weight, bias):
    total = x + update
    return total, torch.nn.functional.layer_norm(total, total.shape[1:], weight, bias)


def plain_rms_norm(x, update, weight):
    total = x + update
    return total, torch.nn.functional.rms_norm(total, weight.shape, weight, 1e-5)


# linear_logprob

TARGETS = torch.tensor([3, 69, 31, 32, 0] * 4)


def our_logprobs(hidden, weight, backend, uniform):
    options = {"statistics": True, "uniform": uniform, "backend": backend}
    return linear_logprob(hidden, weight, TARGETS, **options)[:2]


def plain_logprobs(hidden, weight):
    logprobs = wide(hidden @ weight.T).log_softmax(-1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs.gather(-1, TARGETS[:, None]).squeeze(-1), entropy.detach()


def small_tiles(monkeypatch, backend, dtype):
    """Several tiles of rows and of tokens."""
    module = importlib.import_module("dph_kernels.linear_logprob.native")
    monkeypatch.setattr(module, "MOST_ROWS", 16)
    monkeypatch.setattr(module, "MOST_COLUMNS", 32)
    if backend == "triton":
        module = importlib.import_module("dph_kernels.linear_logprob.triton")
        monkeypatch.setattr(module.Engine, "side", 16)
        monkeypatch.setitem(module.COMBINE, "BLOCKS", 2)


def joint_gradients(monkeypatch, backend, dtype):
    """Gradients along with the log-probabilities, as on processors and in dtypes for which they are worthwhile."""
    small_tiles(monkeypatch, backend, dtype)
    module = importlib.import_module(f"dph_kernels.linear_logprob.{'native' if backend == 'cpu' else 'triton'}")
    monkeypatch.setattr(module, "LEAST_ROWS", 16)
    if backend == "cpu":
        monkeypatch.setattr(module, "mkl_is_faster", lambda: True)
        monkeypatch.setattr(module, "MOST_LOGITS", 16 * 130)
    elif backend == "triton":
        monkeypatch.setattr(module, "JOINT", (dtype,))
        monkeypatch.setattr(module, "_joint_rows", lambda gpu, _: module._config(gpu).block_m)


# swiglu_reward

COLUMNS = 40
DROPOUT = {"dropout": 0.3, "input_dropout": 0.2, "seed": 5}


def reward_inputs(rows, pooler):
    return lambda: {name: x.detach() for name, x in poolers.make(rows, COLUMNS, 36, 2, pooler).items()}


def our_rewards(backend, options, **inputs):
    return (swiglu_reward(**inputs, **options, backend=backend),)


def plain_rewards(options, **inputs):
    masks = {}
    if options:
        for name, key, stream in (
            ("input_mask", "input_dropout", philox.INPUT),
            ("mask", "dropout", philox.POOLED),
        ):
            rows, dtype = torch.arange(len(inputs["hidden"])), inputs["hidden"].dtype
            masks[name] = philox.dropout_mask(rows, COLUMNS, options[key], options["seed"], stream, dtype)
    return (poolers.eager(**inputs, **masks),)


def reward_subject(rows, pooler, options):
    return Subject(
        operator="swiglu_reward",
        make=reward_inputs(rows, pooler),
        ours=partial(our_rewards, options=options),
        plain=partial(plain_rewards, options),
    )


# preference_loss


def pair_inputs(heads):
    return lambda: {name: x.detach() for name, x in preferences.make(6, heads).items()}


def our_pairs(backend, options, **inputs):
    return preference_loss(**inputs, **options, backend=backend)


def accuracy(chosen, rejected):
    """The mean of correct judgements, NaN if there is one in the inputs."""
    return torch.where((chosen - rejected).isnan(), torch.nan, (chosen > rejected).to(chosen.dtype)).mean()


def plain_pairs(options, **inputs):
    inputs = {name: wide(x) for name, x in inputs.items()}
    loss, metrics = preferences.formula(inputs, **preferences.DEFAULTS | options)
    chosen, rejected, *logprobs = inputs.values()
    metrics["finite"] = loss.isfinite().to(loss.dtype)
    metrics["reward_accuracy"] = accuracy(chosen, rejected)
    implicit = (preferences.DEFAULTS["beta"] * (logprobs[i] - logprobs[i + 2]) for i in (0, 1))
    metrics["implicit_accuracy"] = accuracy(*implicit)
    heads = range(chosen.shape[1]) if chosen.dim() == 2 else ()
    for i in heads:
        metrics[f"reward_accuracy_{i}"] = accuracy(chosen[:, i], rejected[:, i])
    names = metric_names([str(i) for i in heads])
    return loss, torch.stack([metrics[name] for name in names]).detach()


def pair_subject(heads, objective, epsilon):
    options = {"objective": objective, "dpo_epsilon": epsilon, "dph_epsilon": epsilon}
    return Subject(
        operator="preference_loss",
        make=pair_inputs(heads),
        ours=partial(our_pairs, options=options),
        plain=partial(plain_pairs, options),
    )


# rope_attention


def attention_inputs(layout, heads):
    def make():
        q, k, v, memory, _ = attention.inputs(layout, heads, 16, torch.float32)
        memory = dict(zip(("memory_k", "memory_v"), memory, strict=True)) if memory else {}
        return {"q": q, "k": k, "v": v, **memory}

    return make


def memory_of(memory):
    return tuple(x.detach() for x in memory.values()) or None


def our_attention(q, k, v, layout, backend, **memory):
    options = {"rope": attention.ROPE, "memory": memory_of(memory), "backend": backend}
    return (rope_attention(q, k, v, layout, **options),)


def masked_attention(layout, q, k, v, **memory):
    return (attention.dense(q, k, v, layout, memory_of(memory)),)


def visible_attention(layout, q, k, v, **memory):
    """Each query with its visible keys alone."""
    q = attention.rotate(q, layout.query_positions, attention.ROPE)
    k = attention.rotate(k, layout.key_positions, attention.ROPE)
    if memory:
        memory_k, memory_v = memory_of(memory)
        k, v = torch.cat([memory_k, k]), torch.cat([memory_v, v])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rows = []
    for query, seen in zip(q, layout.visible(), strict=True):
        scores = torch.einsum("hd,khd->hk", query, k[seen]) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]) if seen.any() else torch.zeros_like(query))
    return (torch.stack(rows),)


def attention_subject(layout, heads=2):
    return Subject(
        operator="rope_attention",
        make=attention_inputs(layout, heads),
        ours=partial(our_attention, layout=layout),
        plain=partial(visible_attention, layout),
        also=partial(masked_attention, layout),
    )


# laprop and gradient_norm

STATE = ("param", "exp_avg", "exp_avg_sq")
STEP = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "bias_correction": 0.4, "momentum_scale": 3.7}


def step_inputs():
    shapes = dict.fromkeys(("param", "exp_avg", "exp_avg_sq", "grad", "prior"), 37)
    inputs = random_inputs(**shapes)()
    return inputs | {"exp_avg_sq": inputs["exp_avg_sq"].square()}


def our_step(backend, decays, grad, prior, **state):
    param, exp_avg, exp_avg_sq = ([state[name].detach().clone()] for name in STATE)
    copies, priors = [torch.empty(37, dtype=torch.bfloat16)], [prior.detach()]
    options = {**STEP, **decays, "copies": copies, "backend": backend}
    laprop(param, [grad.detach()], exp_avg, exp_avg_sq, priors, **options)
    return *param, *exp_avg, *exp_avg_sq, *copies


def plain_step(decays, param, grad, exp_avg, exp_avg_sq, prior):
    lr, beta1, beta2 = STEP["lr"], STEP["beta1"], STEP["beta2"]
    param, grad, exp_avg, exp_avg_sq, prior = (x.detach() for x in (param, grad, exp_avg, exp_avg_sq, prior))
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    direction = grad / (exp_avg_sq.sqrt() + STEP["eps"])
    exp_avg = beta1 * exp_avg + (1 - beta1) * lr * STEP["bias_correction"] * direction
    update = STEP["momentum_scale"] * exp_avg
    if decays:
        update = update + lr * (decays["prior_decay"] * (param - prior) + decays["weight_decay"] * param)
    return param - update, exp_avg, exp_avg_sq, param - update


def step_subject(decays):
    return Subject(
        operator="laprop",
        make=step_inputs,
        ours=partial(our_step, decays=decays),
        plain=partial(plain_step, decays),
        dtypes=(torch.float32,),
    )


def our_norm(backend, **grads):
    norm, scale, finite = gradient_norm([x.detach() for x in grads.values()], max_norm=2.0, backend=backend)
    return norm, scale, finite.float()


def plain_gradient_norm(**grads):
    norm = sum(wide(x.detach()).square().sum() for x in grads.values()).sqrt()
    scale = (2.0 / norm).clamp(max=1.0) if norm.isfinite() else norm * torch.nan
    return norm, scale.reshape(1), norm.isfinite().to(norm.dtype)


SUBJECTS = {
    "swiglu": Subject(
        operator="swiglu",
        make=random_inputs(projected=(5, 2 * 37), bias=(2 * 37,)),
        ours=lambda **inputs: (swiglu(**inputs),),
        plain=plain_swiglu,
    ),
    "residual_norm": Subject(
        operator="residual_norm",
        make=random_inputs(x=(4, 37), update=(4, 37), weight=(37,), bias=(37,)),
        ours=residual_norm,
        plain=plain_norm,
    ),
    "residual_norm-rms": Subject(
        operator="residual_norm",
        make=random_inputs(x=(2, 3, 37), update=(2, 3, 37), weight=(37,)),
        ours=partial(residual_norm, kind="rms"),
        plain=plain_rms_norm,
    ),
    "linear_logprob": Subject(
        operator="linear_logprob",
        make=random_inputs(hidden=(20, 24), weight=(70, 24)),
        ours=partial(our_logprobs, uniform=False),
        plain=plain_logprobs,
        prepare=small_tiles,
    ),
    "linear_logprob-joint": Subject(
        operator="linear_logprob",
        make=random_inputs(hidden=(20, 24), weight=(70, 24)),
        ours=partial(our_logprobs, uniform=True),
        plain=plain_logprobs,
        prepare=joint_gradients,
    ),
    "swiglu_reward-few": reward_subject(3, "swiglu", {}),
    "swiglu_reward-many-dropout": reward_subject(20, "swiglu", DROPOUT),
    "swiglu_reward-bert-few-dropout": reward_subject(3, "bert", DROPOUT),
    "swiglu_reward-bert-many": reward_subject(20, "bert", {}),
    "swiglu_reward-identity": reward_subject(20, "identity", {}),
    "preference_loss-separable": pair_subject(None, "separable", 0.2),
    "preference_loss-separable-hard": pair_subject(2, "separable", 0.0),
    "preference_loss-contrastive": pair_subject(2, "contrastive", 0.2),
    "preference_loss-contrastive-hard": pair_subject(None, "contrastive", 0.0),
    "rope_attention-documents": attention_subject(PackedLayout.documents([9, 21])),
    "rope_attention-branches": attention_subject(PackedLayout.shared_prefix([7, 3], [[3, 1], [9]])),
    "rope_attention-groups": attention_subject(PackedLayout.shared_prefix([7, 3], [[3, 1], [9]]), (4, 2)),
    "rope_attention-memory": attention_subject(PackedLayout.with_memory([9, 5], [12, 12], 12)),
    "rope_attention-blind": attention_subject(PackedLayout.aligned([9, 4], [5, 4], [4, 0])),
    "laprop": step_subject({"weight_decay": 0.1, "prior_decay": 0.5}),
    "laprop-no-decay": step_subject({}),
    "gradient_norm": Subject(
        operator="laprop",
        make=random_inputs(first=(37,), second=(5, 7)),
        ours=our_norm,
        plain=plain_gradient_norm,
    ),
}


# The rule


def evaluate(function, inputs, upstream, dtype=None):
    """Results and gradients by name, computed in ``dtype`` or that of the inputs."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    results = function(**leaves)
    values = {f"result {i}": x.detach() for i, x in enumerate(results)}
    differentiable = [x for x in results if x.requires_grad]
    if differentiable:
        grads = [grad.to(x.dtype) for grad, x in zip(upstream, differentiable, strict=True)]
        grads = torch.autograd.grad(differentiable, leaves.values(), grads, materialize_grads=True, allow_unused=True)
        values |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return values


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is right for one result: see above.

    Attributes:
        clean: the result in fp64 without injected numbers.
        tolerance: relative.
        mixed: NaN and an infinity are right for each other.
        noise: absolute error of elements that the injected number reaches.
        noise_everywhere: and of the others.
        limit: a finite sum above this may have overflowed on the way.
    """

    clean: torch.Tensor
    tolerance: float
    mixed: bool
    noise: float
    noise_everywhere: bool
    limit: float

    def right(self, got, candidate, fp64):
        """Whether each element equals the candidate; ``fp64`` is the one of the same form in that precision."""
        candidate, fp64, got = candidate.to(got.dtype).double(), fp64.to(got.dtype).double(), got.double()
        scale = self.clean.abs().max()
        error = (got - candidate).abs()
        near = error <= self.tolerance * (candidate.abs() + scale)
        reached = ~((fp64 - self.clean).abs() <= self.tolerance * scale)
        near |= (reached | self.noise_everywhere) & (error <= self.noise * scale)
        right = (near & got.isfinite() & candidate.isfinite()) | (got == candidate) | (got.isnan() & candidate.isnan())
        if self.mixed:
            right |= (got.isnan() & candidate.isinf()) | (got.isinf() & candidate.isnan())
        overflows = ~candidate.isfinite() | (candidate.abs() > self.limit)
        return right | (overflows & fp64.isfinite() & ~got.isfinite())


def check(subject, backend, dtype, injected, clean, upstream):
    """Compare the results and gradients with ``injected`` numbers, (name, place in [0, 1), number) each."""
    inputs, grads = {name: x.clone() for name, x in clean.items()}, [x.clone() for x in upstream]
    for name, place, value in injected:
        target = inputs[name] if name in inputs else grads[int(name)]
        target.view(-1)[int(place * target.numel())] = value
    got = evaluate(partial(subject.ours, backend=backend), inputs, grads)
    forms = []
    for plain in filter(None, (subject.plain, None if backend == "cpu" else subject.also)):
        dtypes = dict.fromkeys((torch.float64, torch.float32, dtype))
        forms.append([evaluate(plain, inputs, grads, each) for each in dtypes])
    truth = evaluate(subject.plain, clean, upstream, torch.float64)
    is_attention = subject.operator == "rope_attention"
    infinite = any(math.isinf(value) for _, _, value in injected)
    large = max((abs(value) for _, _, value in injected if math.isfinite(value)), default=0.0)
    for name, result in got.items():
        is_gradient, selects = name.startswith("gradient"), is_attention and dtype != torch.float32
        noise = TOLERANCE[dtype] * large if is_gradient else 2.0 * selects * (large > 0)
        rule = Rule(
            clean=truth[name],
            tolerance=max(TOLERANCE[dtype], TOLERANCE.get(result.dtype, 0.0)),
            mixed=is_gradient and (infinite or large > 0.0),
            noise=noise,
            limit=0.02 * torch.finfo(dtype).max,
            noise_everywhere=is_attention and (backend == "triton" or selects),
        )
        right = torch.zeros(result.shape, dtype=torch.bool)
        for candidates in forms:
            for candidate in candidates:
                right |= rule.right(result, candidate[name], candidates[0][name])
        if not right.all():
            wrong = tuple((~right).nonzero()[0].tolist())
            values = [candidate[name][wrong].item() for candidates in forms for candidate in candidates]
            pytest.fail(f"{injected}: {name}{list(wrong)} is {result[wrong].item()}, plain PyTorch has {values}")


def cases(names, dtype, generator):
    """Injected numbers, of each kind in one to three places; a large one in a single place, as sums would overflow."""
    for value in (math.nan, math.inf, -math.inf, LARGE[dtype], -LARGE[dtype]):
        count = 1 if math.isfinite(value) else generator.choice((1, 1, 3))
        yield [(generator.choice(names), generator.random(), value) for _ in range(count)]


def run(name, backend, dtype, seeds, monkeypatch):
    """All cases of a subject, for each vector width that its kernels can be limited to."""
    subject = SUBJECTS[name]
    if subject.prepare:
        subject.prepare(monkeypatch, backend, dtype)
    limit = None
    if backend == "cpu":
        limit = {
            "swiglu_reward": native.module().swiglu_reward_lanes,
            "rope_attention": native.module().attention_lanes,
            "residual_norm": native.module().residual_norm_lanes,
        }.get(subject.operator)
    for seed in seeds:
        torch.manual_seed(seed)
        generator = random.Random(f"{name} {seed}")
        clean = {key: x.to(dtype) for key, x in subject.make().items()}
        results = subject.plain(**{key: x.float().requires_grad_() for key, x in clean.items()})
        upstream = [torch.randn(x.shape).to(dtype).float() for x in results if x.requires_grad]
        names = [*clean, *map(str, range(len(upstream)))]
        for injected in cases(names, dtype, generator):
            for lanes in (4, 8, 16) if limit else (None,):
                if limit:
                    limit(lanes)
                check(subject, backend, dtype, injected, clean, upstream)


def ways(name):
    """Parameters (name, backend, dtype) of the CPU: on a GPU plain PyTorch's own products have another precision."""
    found = []
    for way in implementations(SUBJECTS[name].operator):
        device, backend = way.values
        for dtype in SUBJECTS[name].dtypes if device == "cpu" else ():
            label = f"{name}-{backend}-{str(dtype).removeprefix('torch.')}"
            found.append(pytest.param(name, backend, dtype, marks=way.marks, id=label))
    return found


WAYS = [way for name in SUBJECTS for way in ways(name)]


@pytest.fixture(autouse=True)
def all_lanes():
    yield
    if native.missing("cpu") is None:
        native.module().swiglu_reward_lanes(16)
        native.module().attention_lanes(16)
        native.module().residual_norm_lanes(16)


@pytest.mark.parametrize(("name", "backend", "dtype"), WAYS)
def test_what_needs_nan_or_infinity_is_that_and_nothing_else(name, backend, dtype, monkeypatch):
    skip_where_unsupported(SUBJECTS[name].operator, "cpu", backend, dtype)
    run(name, backend, dtype, range(1), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend", "dtype"), WAYS)
def test_in_many_places(name, backend, dtype, monkeypatch):
    skip_where_unsupported(SUBJECTS[name].operator, "cpu", backend, dtype)
    run(name, backend, dtype, range(1, 4 if backend == "triton" else 20), monkeypatch)


@pytest.mark.parametrize(("device", "backend"), implementations("swiglu"))
def test_gates_whose_sigmoid_is_no_normal_number(device, backend):
    """Below -87 it has fewer bits than usual, and below -103.3 it is 0; a large or infinite factor shows it."""
    if backend == "reference":
        pytest.skip("PyTorch's own silu is 0 from -88.8 on")
    gates = torch.cat([torch.linspace(-103.0, -80.0, 47), torch.linspace(80.0, 110.0, 31)])
    for x in (3e38, -3e38, 1.0, torch.inf, -torch.inf, torch.nan):
        projected = torch.stack([torch.full_like(gates, x), gates], 1).to(device)
        got = swiglu(projected, backend=backend).squeeze(1).cpu()
        truth = (x * torch.nn.functional.silu(gates.double())).float()
        spacing = 2.0**-149 * 110 * abs(x) if math.isfinite(x) else 0.0  # of the smallest numbers, in the result
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=2 * spacing, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference", "sdpa"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_document_does_not_reach_the_others_of_its_tile(backend, value):
    """Bit for bit, in results and gradients, whichever of its tensors has a number that is not finite."""
    layout = PackedLayout.documents([5, 7, 6])
    *given, _, grad = attention.inputs(layout, 2, 16, torch.float32)

    def results():
        return attention.run(rope_attention, given, layout, None, grad, torch.float32, backend=backend, rope=Rotary())

    expected = results()
    for spoiled in (*given, grad):
        kept = spoiled[8].clone()
        spoiled[8] = value
        for got, wanted in zip(results(), expected, strict=True):
            assert torch.equal(got[:5], wanted[:5])
            assert torch.equal(got[12:], wanted[12:])
        spoiled[8] = kept


@pytest.mark.parametrize(("device", "backend"), implementations("rope_attention"))
@pytest.mark.parametrize("finite", [0, 3])
def test_scores_of_minus_infinity_are_not_taken_for_hidden_ones(finite, device, backend):
    """The softmax of nothing but minus infinity is NaN, not the zeros of a row that sees no key; else they count as 0.

    One query and more keys than a tile has, so that work on a GPU is split.
    """
    keys = 300
    layout = PackedLayout(torch.tensor([[0, 1, 0, keys, 0, 0, keys]]), 1, 0, keys).to(device)
    q, k, v, (memory_k, memory_v), grad = attention.inputs(layout, 2, 16, torch.float32, device)
    rotated = attention.rotate(q, layout.query_positions, attention.ROPE)
    memory_k[: keys - finite, :, 0] = -torch.inf * rotated[0, :, 0].sign()
    given = (q, k, v), layout, (memory_k, memory_v), grad
    got = attention.run(rope_attention, *given, torch.float32, rope=attention.ROPE, backend=backend)
    truth = attention.run(attention.dense, *given, torch.float64)
    assert truth[0].isnan().all() == (finite == 0)
    torch.testing.assert_close(got[0], truth[0].float(), equal_nan=True)
    assert torch.equal(got[1].isnan(), truth[1].isnan())
