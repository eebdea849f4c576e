"""swiglu_reward: what all backends owe each other, and what the C++ and the Triton kernels each need tested."""

import pytest
import torch
from helpers.numerics import implementations
from helpers.poolers import POOLERS, SIZES, compare, eager, make

from dph_kernels import dispatch, native, philox
from dph_kernels.launcher import triton_device
from dph_kernels.swiglu_reward import swiglu_reward

BACKENDS = implementations("swiglu_reward")
WITHOUT_CPP = dispatch.missing("swiglu_reward", "cpu", "cpu")
cpp = pytest.mark.skipif(WITHOUT_CPP is not None, reason=str(WITHOUT_CPP))


def gradients(inputs, backend, **options):
    """Rewards and gradients of a weighted sum of them."""
    rewards = swiglu_reward(**inputs, backend=backend, **options)
    weights = torch.linspace(-1, 2, rewards.numel(), device=rewards.device).view(rewards.shape)
    return [rewards, *torch.autograd.grad((rewards * weights).sum(), inputs.values())]


# Dropout


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("stream", [philox.POOLED, philox.INPUT])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -(2**62) + 5])
def test_masks_are_the_same_to_the_bit_forward_and_backward(seed, stream, device, backend):
    """Without a pooler, with ones for hidden states and unit vectors for rewards, the result is the mask itself."""
    columns, ids = 33, torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)], device=device)
    hidden = torch.ones(len(ids), columns, device=device, requires_grad=True)
    name = {philox.POOLED: "dropout", philox.INPUT: "input_dropout"}[stream]
    options = {name: 0.3, "seed": seed, "row_ids": ids, "backend": backend}
    rewards = swiglu_reward(hidden, torch.eye(columns, device=device), **options)
    expected = philox.dropout_mask(ids, columns, 0.3, seed, stream, torch.float32)
    assert torch.equal(rewards, expected)
    assert torch.equal(torch.autograd.grad(rewards.sum(), hidden)[0], expected)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_gathered_rows_keep_their_masks(device, backend):
    """The rows of one batch, judged as two: the same rewards, and gradients that add up."""
    inputs, ids = make(11, 33, 17, 2, device=device), torch.arange(11, device=device) + 5
    options = {"dropout": 0.4, "input_dropout": 0.2, "seed": 9, "backend": backend}
    whole = swiglu_reward(**inputs, **options, row_ids=ids)
    weights = [x for name, x in inputs.items() if name != "hidden"]
    expected = torch.autograd.grad(whole.square().sum(), weights, retain_graph=True)
    parts = []
    for rows in (slice(None, None, 2), slice(1, None, 2)):
        parts.append(swiglu_reward(**{**inputs, "hidden": inputs["hidden"][rows]}, **options, row_ids=ids[rows]))
        torch.testing.assert_close(parts[-1], whole[rows])
    got = torch.autograd.grad(sum(part.square().sum() for part in parts), weights)
    torch.testing.assert_close(got, expected)


# The same results, however they are asked for


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_repeats_are_identical(pooler, device, backend):
    inputs = make(37, 65, 130, 3, pooler, device=device)
    options = {"dropout": 0.1, "input_dropout": 0.1, "seed": 2}
    first = gradients(inputs, backend, **options)
    for _ in range(100 if device == "cuda" else 3):
        assert all(map(torch.equal, gradients(inputs, backend, **options), first))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_rewards_do_not_change_where_nothing_is_kept(pooler, device, backend):
    inputs = make(17, 33, 40, 2, pooler, device=device)
    trained = swiglu_reward(**inputs, dropout=0.1, backend=backend)
    with torch.no_grad():
        judged = swiglu_reward(**inputs, dropout=0.1, backend=backend)
    if (device, backend) == ("cuda", "triton"):  # two kernels, in which the compiler may add up in another order
        return torch.testing.assert_close(judged, trained, rtol=1e-6, atol=1e-6)
    assert torch.equal(judged, trained)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_each_gradient_alone(pooler, device, backend):
    inputs = make(17, 33, 40, 2, pooler, device=device)
    options = {"dropout": 0.1, "input_dropout": 0.3, "backend": backend}
    expected = torch.autograd.grad(swiglu_reward(**inputs, **options).square().sum(), inputs.values())
    for name, want in zip(inputs, expected, strict=True):
        fixed = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        swiglu_reward(**fixed, **options).square().sum().backward()
        torch.testing.assert_close(fixed[name].grad, want)
        assert all(x.grad is None for other, x in fixed.items() if other != name)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", [(300, 40, 50, 2), (520, 8, 6, 1), (5, 300, 290, 2), (17, 16, 300, 1), (2, 600, 3, 1)])
@pytest.mark.parametrize("pooler", ["bert", "swiglu"])
def test_more_than_one_block_of_everything(size, pooler, device, backend):
    compare(make(*size, pooler, device=device), backend, dropout=0.1, input_dropout=0.2)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_hidden_states_of_a_longer_sequence(device, backend):
    """The last states of [B, S, C] as they lie, without a copy."""
    inputs = make(6, 32, 48, 1, device=device)
    states = torch.randn(6, 7, 32, device=device)
    compare({**inputs, "hidden": states[:, -1].detach().requires_grad_()}, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_infinite_weights_show_where_they_are(device, backend):
    inputs = {name: x.detach() for name, x in make(3, 8, 6, 2, device=device).items()}
    inputs["reward"][1, 3] = torch.inf
    rewards = swiglu_reward(**inputs, backend=backend)
    assert rewards.isfinite().tolist() == [[True, False]] * 3


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_opcheck(pooler, device, backend):
    inputs = make(5, 8, 6, 2, pooler, device=device)
    tensors = [inputs.get(name) for name in ("hidden", "reward", "w1", "b1", "w2", "b2")]
    forward, backward = torch.ops.dph.swiglu_reward.default, torch.ops.dph.swiglu_reward_backward.default
    torch.library.opcheck(forward, (*tensors, None, 0.1, 0.2, 3, True, backend))
    tensors = [x if x is None else x.detach() for x in tensors]
    ids = torch.arange(5, device=device)
    torch.library.opcheck(forward, (*tensors, ids, 0.1, 0.0, 3, False, backend))
    rewards, *kept = forward(*tensors, None, 0.1, 0.2, 3, True, backend)
    given = (torch.ones_like(rewards), tensors[0], tensors[1], tensors[2], tensors[4], None, *kept)
    for needs in ([x is not None for x in tensors], [False, True, *[False] * 4]):
        torch.library.opcheck(backward, (*given, 0.1, 0.2, 3, needs, backend))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_compiles_as_one_graph_for_any_number_of_rows(device, backend):
    def loss(*values):
        return swiglu_reward(**dict(zip(names, values, strict=True)), dropout=0.3, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 17, 33):
        inputs = make(rows, 8, 6, 2, device=device)
        names = list(inputs)
        expected = torch.autograd.grad(loss(*inputs.values()), inputs.values())
        torch.testing.assert_close(torch.autograd.grad(compiled(*inputs.values()), inputs.values()), expected)


# Large offsets


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("input_dropout", [0.0, 0.2])
@pytest.mark.parametrize("pooler", POOLERS)
def test_rows_that_lie_further_apart_than_int32_counts(pooler, input_dropout, device, backend):
    """Elements 0, 2**30 and 2**31 of a tensor of which only these pages are touched."""
    if (device, backend) == ("cuda", "reference"):
        pytest.skip("cuBLAS, which PyTorch's own products are, counts elements with 32 bits")
    storage = torch.empty(2**31 + 16, dtype=torch.bfloat16 if backend == "cpu" else torch.float16, device=device)
    hidden = storage.as_strided((3, 16), (2**30, 1))
    hidden.copy_(torch.randn(3, 16))
    inputs = make(3, 16, 8, 2, pooler, storage.dtype, device)
    options = {"dropout": 0.2, "input_dropout": input_dropout}
    far, near = (
        gradients({**inputs, "hidden": x.detach().requires_grad_()}, backend, **options)
        for x in (hidden, hidden.clone(memory_format=torch.contiguous_format))
    )
    assert all(map(torch.equal, far, near))


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.skipif(not dispatch.interpreted(), reason="Triton's interpreter is off")
def test_an_overflow_would_be_noticed():
    import triton
    import triton.language as tl

    @triton.jit
    def wrap(out, number):
        tl.store(out, number * number)

    with pytest.raises(Exception, match="overflow"):
        wrap[(1,)](torch.zeros(1, dtype=torch.int32), 2**17)


# C++


@pytest.fixture(params=[4, 8, 16])
def lanes(request):
    """Vectors of so many floats."""
    try:
        if native.module().swiglu_reward_lanes(request.param) != request.param:
            pytest.skip(f"this processor has no vectors of {request.param} floats")
        yield request.param
    finally:
        native.module().swiglu_reward_lanes(16)


@cpp
@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["by rows", "by columns"])
def test_a_row_has_the_same_bits_in_any_batch(layout, dtype):
    """Few answers are multiplied by other kernels than many."""
    inputs, ids = make(70, 300, 301, 2, dtype=dtype), torch.arange(70)
    inputs = {name: x.detach() for name, x in inputs.items()}
    if layout == "by columns":
        inputs |= {name: inputs[name].T.contiguous().T for name in ("w1", "w2")}
    options = {"dropout": 0.2, "input_dropout": 0.1, "backend": "cpu"}
    whole = swiglu_reward(**inputs, **options, row_ids=ids)
    for rows in ([69], [3, 40], [3, 40, 41], [1, 2, 3, 4], [1, 2, 3, 4, 5], list(range(20))):
        part = swiglu_reward(**{**inputs, "hidden": inputs["hidden"][rows]}, **options, row_ids=ids[rows])
        assert torch.equal(part, whole[rows])


@cpp
@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(
    ("columns", "width"), [(16, 16), (15, 17), (33, 31), (129, 40), (17, 257), (40, None), (261, None)]
)
def test_few_answers_have_the_bits_of_many(columns, width, biases, dtype):
    """Forward and backward, at the edges of vectors, blocks and panels."""
    inputs = make(20, columns, 1 if width is None else width, 2, dtype=dtype)
    if width is None:
        inputs |= {"w1": None, "b1": None, "w2": make(1, columns, columns, 1, dtype=dtype)["w2"]}
    if not biases:
        inputs |= {"b1": None, "b2": None}
    inputs["w2"] = inputs["w2"].detach().repeat(1, 2)[:, : inputs["w2"].shape[1]].requires_grad_()  # rows lie apart
    ids, options = torch.arange(20), {"dropout": 0.2, "input_dropout": 0.1, "seed": 3, "backend": "cpu"}
    hidden = inputs.pop("hidden").detach()

    def run(rows):
        some = hidden[rows].requires_grad_()
        rewards = swiglu_reward(some, **inputs, **options, row_ids=ids[rows])
        with torch.no_grad():
            assert torch.equal(swiglu_reward(some, **inputs, **options, row_ids=ids[rows]), rewards)
        return rewards, torch.autograd.grad(rewards.sum(), some)[0]

    whole = run(list(range(20)))
    for count in (1, 2, 3, 4, 6, 7, 8, 9):
        rows = list(range(11, 11 + count))
        for few, many in zip(run(rows), whole, strict=True):
            assert torch.equal(few, many[rows])


@cpp
@pytest.mark.parametrize("place", ["hidden", "w1", "w2"])
def test_nan_goes_where_it_belongs_among_few(place):
    inputs = {name: x.detach() for name, x in make(3, 40, 40, 2).items()}
    inputs[place][1] = torch.nan
    found = swiglu_reward(**inputs, backend="cpu").isnan()
    assert found[1].all() if place == "hidden" else found.all()
    assert place != "hidden" or not found[[0, 2]].any()


@cpp
@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [SIZES[2], SIZES[4], (3, 300, 70, 2), (40, 300, 70, 2)])
def test_vectors_of_any_width(size, dtype):
    compare(make(*size, dtype=dtype), "cpu", dropout=0.1, input_dropout=0.1)


@cpp
def test_results_have_the_same_bits_on_any_number_of_threads():
    inputs = make(70, 65, 300, 2)
    first, threads = gradients(inputs, "cpu", dropout=0.2), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, gradients(inputs, "cpu", dropout=0.2), first))
    finally:
        torch.set_num_threads(threads)


@cpp
def test_the_layout_agrees_with_the_kernels():
    from dph_kernels.swiglu_reward.native import LANES

    assert LANES == native.module().REWARD_LANES


# Triton


def test_splits_are_tested():
    """The sizes above reach the last program's sum over splits, and over tiles of rows."""
    from dph_kernels.swiglu_reward import triton as gpu

    device = triton_device(torch.device("cpu"), gpu.INTERPRETER_SMS)
    config = gpu._config(device, "pool", 5, torch.empty(0))
    assert gpu._splits(7, 257, config, device) > 1
    assert max(rows for rows, *_ in SIZES) > config.block_m


def test_eager_is_what_the_reference_computes():
    inputs = make(5, 8, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(swiglu_reward(**inputs, backend="reference"), eager(**inputs))
