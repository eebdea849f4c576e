"""Rotary attention in Triton beyond the common tests: split work, wide offsets; at full size on a GPU."""

import inspect

import pytest
import torch
from helpers.attention import ROPE, compare, inputs, run
from helpers.numerics import assert_close_to_fp64

from dph_kernels import PackedLayout, dispatch, rope_attention

if reason := dispatch.missing("rope_attention", "triton", "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip(reason, allow_module_level=True)

from dph_kernels.launcher import TritonDevice
from dph_kernels.rope_attention import OPERATOR, joined_gradients
from dph_kernels.rope_attention import triton as attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(not dispatch.interpreted(), reason="needs Triton's interpreter")


@interpreted
@pytest.mark.parametrize("heads", [2, (6, 2), (34, 1)])
def test_split_work_gives_what_whole_work_gives(heads, monkeypatch):
    """Few queries on many keys: the parts, put together, against one pass and the definition."""
    layout = PackedLayout.decode([300, 5], [[1, 3, 9], [2]], 9)
    given = inputs(layout, heads, 16, torch.float32)
    taken = []
    monkeypatch.setattr(attention, "_plan", attention._plan.__wrapped__)  # which is kept, however it was limited
    monkeypatch.setattr(attention, "_limit", lambda *_: taken.append(1) or 2)
    compare(layout, given, "cpu", "triton")
    q, k, v, memory, grad = given
    split = run(rope_attention, (q, k, v), layout, memory, grad, torch.float32, rope=ROPE, backend="triton")
    combined = []
    assert taken
    monkeypatch.setattr(attention, "_limit", lambda *_: combined.append(1) or 0)
    whole = run(rope_attention, (q, k, v), layout, memory, grad, torch.float32, rope=ROPE, backend="triton")
    assert combined, "work was planned anew, and whole"
    for got, want in zip(split, whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("head_dim", [2, 6, 34, 66, 100, 128])
def test_head_dimensions_that_are_no_power_of_two(head_dim):
    layout = PackedLayout.shared_prefix([33], [[7, 1]])
    compare(layout, inputs(layout, 2, head_dim, torch.float32, DEVICE), DEVICE, "triton")


def test_no_kernel_is_compiled_anew_for_a_stride_or_a_size():
    from dph_kernels.rope_attention import triton_kernels as kernels

    for kernel in (kernels.rotate, kernels.forward, kernels.combine, kernels.backward_queries, kernels.backward_keys):
        names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper() or len(name) == 1]
        numbers = {name for name in names if name.endswith(("_row", "_head")) or name in ("T", "H", "rows", "M")}
        assert numbers <= set(kernels.NUMBERS), kernel


@pytest.mark.parametrize("head_dim", [16, 100])
@pytest.mark.parametrize("gap", [0, 4, 48])
def test_strides_in_tuples_are_multiples_of_16(gap, head_dim):
    """Triton specializes all integers in tuples: multiples of 16 give one kernel, and none of them is taken for 1."""

    class Device(TritonDevice):
        def launch(self, kernel, grid, config, arguments, constants):
            values.extend(arguments.values())

    values, layout = [], PackedLayout.with_memory([9, 20], [4, 12], 12)
    *tensors, memory, grad = inputs(layout, (4, 2), head_dim + gap, torch.float32)
    q, k, v, memory_k, memory_v, grad = (x[..., :head_dim] for x in (*tensors, *memory, grad))
    rest = layout.segments, *layout.tables(ROPE, head_dim, torch.float32), 0.3
    gpu = Device(torch.device("cpu"), 90, 132)
    out, lse, rotated = attention._forward(gpu, q, k, v, memory_k, memory_v, *rest)
    attention._backward(gpu, (q, k, v), grad, q, rotated, v, memory_k, memory_v, out, lse, *rest)
    integers = [x for value in values if isinstance(value, tuple) for x in flattened(value) if isinstance(x, int)]
    assert len(integers) > 20
    assert all(x % 16 == 0 for x in integers)


def flattened(value):
    return [x for element in value for x in flattened(element)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), ((3, 1), 6), ((4, 2), 16)])
@pytest.mark.parametrize(
    "layout",
    [PackedLayout.shared_prefix([33, 5], [[7, 1], [2]]), PackedLayout.with_memory([9, 20], [4, 12], 12)],
    ids=["pairs", "memory"],
)
def test_gradients_side_by_side(layout, heads, head_dim):
    layout = layout.to(DEVICE)
    q, k, v, memory, grad = inputs(layout, heads, head_dim, torch.float32, DEVICE)
    memory = memory or (k[:0], v[:0])
    q_cos, q_sin, k_cos, k_sin = layout.tables(ROPE, head_dim, torch.float32)
    rest = {"memory_k": memory[0], "memory_v": memory[1], "segments": layout.segments, "scale": 0.3}
    rest |= {"q_cos": q_cos, "q_sin": q_sin, "k_cos": k_cos, "k_sin": k_sin}
    out, lse, rotated = OPERATOR.forward(q=q, k=k, v=v, **rest, backend="triton")
    known = {"grad": grad, "q": q, "rotated": rotated, "v": v, "out": out, "lse": lse, **rest}
    assert torch.equal(joined_gradients(**known, backend="triton"), torch.cat(attention.backward(**known), 1))


def test_gradients_side_by_side_need_as_many_keys():
    q = torch.zeros(5, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"v: expected shape \[5, 2, 8\], got \[3, 2, 8\]"):
        joined_gradients(q=q, v=q[:3, :2], backend="triton")


@interpreted
@pytest.mark.usefixtures("overflow_is_an_error")
def test_the_detector_of_overflow_works():
    import triton
    import triton.language as tl

    @triton.jit
    def far(x, stride):
        tl.store(x, tl.program_id(0) * stride + stride * 3)

    far[(1,)](torch.zeros(1, dtype=torch.int64), 2**28)
    with pytest.raises(Exception, match="overflow"):
        far[(1,)](torch.zeros(1, dtype=torch.int64), 2**30)


@interpreted
@pytest.mark.usefixtures("overflow_is_an_error")
def test_rows_that_lie_far_apart():
    """Offsets beyond 2**31 elements: memory that is reserved, and touched only where the rows lie."""
    layout, near = PackedLayout.documents([3]), []
    try:
        spread = [torch.empty_strided((3, 1, 16), (2**30 + 8, 16, 1), dtype=torch.float16) for _ in range(4)]
    except RuntimeError:
        pytest.skip("this machine reserves no 16 GB that are not used")
    for x in spread:
        x.copy_(torch.randn(3, 1, 16))
        near.append(x.contiguous())
    results = []
    for q, k, v, grad in (spread, near):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = rope_attention(*leaves, layout, rope=ROPE, backend="triton")
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for far, close in zip(*results, strict=True):
        torch.testing.assert_close(far, close, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "layout",
    [
        PackedLayout.with_memory([2048] * 2, [2048, 1500], 2048),
        PackedLayout.shared_prefix([700, 1024], [[256, 4], [100, 77]]),
        PackedLayout.decode([1024], [[1 + i % 64 for i in range(128)]], 64),
        PackedLayout.documents([4096, 1, 333]),
    ],
)
def test_full_size(layout, dtype):
    for heads in (4, (8, 2)):
        compare(layout, inputs(layout, heads, 64, dtype, "cuda"), "cuda", "triton")


@pytest.mark.gpu
def test_a_hundred_runs_are_the_same_bit_for_bit():
    layout = PackedLayout.shared_prefix([300, 64], [[100, 77, 5], [9]]).to("cuda")
    q, k, v, memory, grad = inputs(layout, (8, 2), 64, torch.bfloat16, "cuda")
    first = None
    for _ in range(100):
        results = run(rope_attention, (q, k, v), layout, memory, grad, torch.bfloat16, rope=ROPE, backend="triton")
        first = first or results
        assert all(map(torch.equal, results, first))


def test_rotation_alone():
    x = torch.randn(70, 3, 20, device=DEVICE)
    tables = ROPE.tables(torch.arange(70, device=DEVICE), 20)
    from dph_kernels.rope_attention import reference

    truth = reference.rotate(x.double(), *(t.double() for t in tables))
    assert_close_to_fp64(attention.rotate(x, *tables), reference.rotate(x, *tables), truth)
