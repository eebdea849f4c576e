"""A block as one autograd node, and the conditions under which it is computed in parts."""

import contextlib
import copy
import re

import pytest
import torch
from helpers.forced import forced
from helpers.numerics import assert_close_to_fp64
from helpers.tiny import FORMS, tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint

import dph
from dph.model import backbone, fused_block
from dph.model.backbone import Backbone, Block, block_form
from dph.train import compile
from dph_kernels import PackedLayout, dispatch

pytestmark = pytest.mark.usefixtures("every_kernel")
LAYOUT = PackedLayout.shared_prefix([5, 9], [[3, 4], [2, 6]])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def block_of(dtype=torch.float64, device="cpu", **form):
    block = Block(tiny_config(**form))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return block.to(device, dtype)


def given(block, rows=LAYOUT.queries):
    weight = block.ffn_norm.weight
    inputs = torch.randn(2, rows, len(weight), generator=torch.Generator().manual_seed(1)).to(weight)
    return inputs[0].requires_grad_(), inputs[1]


def in_parts(block):
    """The same block, which somebody watches."""
    watched = copy.deepcopy(block)
    watched.ffn.register_forward_hook(lambda *_: None)
    return watched


def one_node(result):
    return len(nodes(result)) == 1


def results(block, x, grad, layout=LAYOUT):
    """[output, gradients of x and of all weights]."""
    result = block(x, layout)
    return [result, *torch.autograd.grad(result, [x, *block.parameters()], grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["dph", *FORMS])
def test_it_equals_the_block_in_parts(device, dtype, form):
    block, layout = block_of(dtype, device, **form), LAYOUT.to(device)
    exact = block_of(torch.float64, device, **form).requires_grad_()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), block.parameters(), strict=True):
            p.copy_(q)
    x, grad = given(block)
    whole = results(block, x, grad, layout)
    assert one_node(whole[0])
    parts = results(in_parts(block), x, grad, layout)
    assert not one_node(parts[0])
    truth = results(in_parts(exact), x.detach().double().requires_grad_(), grad.double(), layout)
    names = ["result", "x", *(name for name, _ in block.named_parameters())]
    for name, a, b, c in zip(names, whole, parts, truth, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_close_to_fp64(a, b, c, name)
    assert torch.equal(whole[0], parts[0])
    assert all(map(torch.equal, whole, results(block_of(dtype, device, **form), x, grad, layout)))


@pytest.mark.skipif(not dispatch.interpreted(), reason="needs Triton's interpreter")
def test_it_equals_the_block_in_parts_by_triton():
    block = block_of(torch.float32)
    x, grad = given(block)
    with forced("triton") as used:
        found = [results(each, x, grad) for each in (block, in_parts(block))]
    assert {(operator, "triton") for operator in ("rope_attention", "residual_norm", "swiglu")} <= used
    assert [one_node(result) for result, *_ in found] == [True, False]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts)


def test_gradients_are_those_of_differences():
    block = block_of()
    x, _ = given(block)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *weights):
        for name, weight in zip(names, weights, strict=True):
            owner, _, own = name.rpartition(".")
            module = block.get_submodule(owner)
            module._parameters[own] = weight
        result = block(x, LAYOUT)
        assert not result.requires_grad or one_node(result)
        return result

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=True)


def test_without_gradients_nothing_is_kept(monkeypatch):
    block, kept, calls = block_of(), [], []
    x, _ = given(block)
    expected = block(x, LAYOUT)
    run = backbone.fused_block
    monkeypatch.setattr(backbone, "fused_block", lambda *given: calls.append(1) or run(*given))
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        with torch.no_grad():
            assert torch.equal(block(x, LAYOUT), expected)
        with torch.inference_mode():
            assert torch.equal(block(x, LAYOUT), expected)
        frozen = block.requires_grad_(False)(x.detach(), LAYOUT)
    assert torch.equal(frozen, expected)
    assert frozen.grad_fn is None
    assert len(calls) == 3
    assert not kept


def test_an_input_that_needs_no_gradient():
    block = block_of()
    x, grad = given(block)
    _, _, *expected = results(block, x, grad)
    result = block(x.detach(), LAYOUT)
    assert one_node(result)
    assert all(map(torch.equal, torch.autograd.grad(result, list(block.parameters()), grad), expected))


def test_the_backward_pass_under_autocast():
    block = block_of(torch.float32)
    x, grad = given(block)
    expected, result = results(block, x, grad), block(x, LAYOUT)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(result, [x, *block.parameters()], grad)
    assert all(x.isfinite().all() for x in found)
    for a, b in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_biases_that_the_backward_pass_does_not_read_may_change():
    block = block_of()
    x, grad = given(block)
    expected = results(block, x, grad)[1]
    result = block(x, LAYOUT)
    with torch.no_grad():
        block.attention_norm.bias.mul_(2)
        block.ffn.fc2.bias.mul_(2)
    assert torch.equal(torch.autograd.grad(result, x, grad)[0], expected)


def test_upstream_gradients_of_any_strides():
    block = block_of()
    x, grad = given(block)
    expected = results(block, x, grad)
    for strided in (grad.t().contiguous().t(), grad.repeat_interleave(2, 1)[:, ::2]):
        assert strided.stride() != grad.stride()
        for a, b in zip(results(block, x, strided), expected, strict=True):
            torch.testing.assert_close(a, b)
    row = grad[:1]
    for a, b in zip(results(block, x, row.expand_as(grad)), results(block, x, row.repeat(len(grad), 1)), strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_of_any_strides():
    block = block_of()
    x, grad = given(block)
    strided = x.detach().t().contiguous().t().requires_grad_()
    assert one_node(block(strided, LAYOUT))
    for a, b in zip(results(block, strided, grad), results(block, x, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_batched_gradients():
    block = block_of(torch.float32)
    x, grad = given(block)
    result = block(x, LAYOUT)
    both = torch.autograd.grad(result, x, torch.stack([grad, -2 * grad]), is_grads_batched=True, retain_graph=True)[0]
    (expected,) = torch.autograd.grad(result, x, grad)
    torch.testing.assert_close(both, torch.stack([expected, -2 * expected]))


def test_gradients_of_gradients_are_refused():
    block = block_of()
    x, grad = given(block)
    (first,) = torch.autograd.grad(block(x, LAYOUT), x, grad, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(block(x, LAYOUT), x, grad)[0])
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        first.sum().backward()


def test_checkpointing_computes_it_again():
    block = block_of()
    x, grad = given(block)
    expected = results(block, x, grad)
    result = checkpoint(block, x, LAYOUT, use_reentrant=False)
    found = [result, *torch.autograd.grad(result, [x, *block.parameters()], grad)]
    assert all(map(torch.equal, found, expected))


def streams(model, whole, calls=3):
    """Hidden states and gradients of the weights, over several calls with a memory."""
    model = copy.deepcopy(model)
    for block in [] if whole else model.backbone.blocks:
        block.ffn.register_forward_hook(lambda *_: None)
    memory, found = dph.Memory(length=6), []
    for call in range(calls):
        ids = torch.arange(10).reshape(2, 5) + 4 + call
        hidden = model(ids, past_key_values=memory).logits
        assert (nodes(hidden) == ["_FusedBlockBackward"] * 2) == whole
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        found.append(hidden)
    return found + [p.grad for p in model.parameters() if p.grad is not None]


def nodes(result):
    """Names of the graph's nodes that are blocks."""
    seen, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return [type(node).__name__ for node in seen if type(node).__name__ == "_FusedBlockBackward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streams_with_memory(checkpointing, dtype):
    model = dph.Model(tiny_config()).to(dtype)
    if checkpointing:
        model.backbone.gradient_checkpointing = True
    for a, b in zip(streams(model, True), streams(model, False), strict=True):
        torch.testing.assert_close(a, b)


def test_memory_of_hidden_states_is_taken_in_parts():
    model = dph.Model(tiny_config()).double()
    assert not nodes(model(torch.arange(8).reshape(2, 4) + 4, past_key_values=dph.Memory(4, kind="hidden")).logits)


def replaced(block):
    block.ffn.fc1 = nn.Sequential(block.ffn.fc1)


def another_forward(block):
    module = block.attention.out
    module.forward = lambda x: nn.functional.linear(x, module.weight, module.bias)


def another_method(block):
    block.after = lambda x, attended: Block.after(block, x, attended)


def another_class(block):
    block.__class__ = type("Other", (Block,), {"before": lambda self, x: Block.before(self, x)})


def plain_attribute(block):
    weight = block.attention.qkv._parameters.pop("weight")
    block.attention.qkv.weight = weight * 1


def hooked(place, register):
    def change(block):
        getattr(block.get_submodule(place), register)(lambda *_: None)

    return change


def frozen(place):
    return lambda block: block.get_submodule(place).requires_grad_(False)


def of_class(place, kind):
    """The module at ``place`` in another class."""

    def change(block):
        module = block.get_submodule(place)
        module.__class__ = kind if isinstance(kind, type) else type("Other", (type(module),), {})

    return change


class Wrapped(nn.Parameter):
    """A subclass of parameters."""


def subclass_of_a_weight(block):
    norm = block.attention_norm
    norm._parameters["bias"] = norm.bias.detach().as_subclass(Wrapped).requires_grad_()


PLACES = ("attention_norm", "attention", "attention.qkv", "attention.out", "ffn_norm", "ffn", "ffn.fc1")
REPLACED = "method before or after is replaced"
CHANGES = {
    **{f"hook on {place}": (hooked(place, "register_forward_hook"), f"{place} has hooks") for place in PLACES},
    **{f"other class of {place}": (of_class(place, "subclass"), rf"{place} is a \S+Other, not a") for place in PLACES},
    "forward pre-hook": (hooked("ffn.fc1", "register_forward_pre_hook"), "ffn.fc1 has hooks"),
    "backward hook": (hooked("ffn_norm", "register_full_backward_hook"), "ffn_norm has hooks"),
    "backward pre-hook": (hooked("attention.out", "register_full_backward_pre_hook"), "attention.out has hooks"),
    "plain norm": (of_class("ffn_norm", nn.LayerNorm), r"ffn_norm is a torch\S+, not a dph\S+LayerNorm"),
    "replaced module": (replaced, "ffn.fc1 is a .*Sequential, not a .*Linear"),
    "own forward": (another_forward, "attention.out has a forward method of its own"),
    "own after": (another_method, REPLACED),
    "class with another before": (another_class, REPLACED),
    "weight that is no parameter": (plain_attribute, "qkv is not a parameter"),
    "subclass of a weight": (subclass_of_a_weight, "a tensor is a Wrapped, not a plain tensor"),
    "one frozen weight": (lambda block: block.attention.out.weight.requires_grad_(False), "only some of its tensors"),
    "frozen attention": (frozen("attention"), "only some of its tensors need gradients"),
    "frozen block": (frozen(""), "only some of its tensors need gradients"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_block_that_was_changed_is_taken_in_parts(change, reason):
    block = block_of()
    x, grad = given(block)
    expected = block(x, LAYOUT)
    assert one_node(expected)
    gradients = dict(zip(("x", *dict(block.named_parameters())), results(block, x, grad)[1:], strict=True))
    change(block)
    form = block_form(block, x, LAYOUT)
    assert not form.fused
    assert re.search(reason, form.reason)
    result = block(x, LAYOUT)
    assert not one_node(result)
    torch.testing.assert_close(result, expected)
    result.backward(grad)
    torch.testing.assert_close(x.grad, gradients["x"])
    for name, weight in block.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, gradients[name.replace("fc1.0.", "fc1.")])


class Observed(torch.utils._python_dispatch.TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def patched(target, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def autocast():
    return torch.autocast("cpu", torch.bfloat16)  # under which fp64 stays fp64


MODES = {
    "a hook on all modules": (global_hook, "a hook is registered on all modules"),
    "autocast": (autocast, "autocast is active"),
    "few elements": (lambda: patched(dispatch, "SMALL_ELEMENTS", 10**6), "up to 1000000 elements"),
    "wide rows": (lambda: patched(fused_block, "WIDEST", 8), "rows have more than 8 elements"),
    "a dispatch mode": (Observed, "a torch dispatch mode is active"),
    "forward-mode differentiation": (torch.autograd.forward_ad.dual_level, "forward-mode differentiation is active"),
    "torch.compile": (lambda: patched(torch.compiler, "is_compiling", lambda: True), "torch.compile traces the call"),
}


@pytest.mark.parametrize(("mode", "reason"), MODES.values(), ids=MODES)
def test_modes_that_need_the_parts(mode, reason):
    block = block_of()
    x, grad = given(block)
    expected = results(block, x, grad)
    assert one_node(expected[0])
    with mode():
        form = block_form(block, x, LAYOUT)
        found = results(block, x, grad)
    assert not form.fused
    assert re.search(reason, form.reason)
    assert not one_node(found[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert block_form(block, x, LAYOUT).fused


def batched(block, x, grad):
    result = torch.func.vmap(lambda x: block(x, LAYOUT))(x[None])[0]
    return result, torch.autograd.grad(result, x, grad)[0]


def traced(block, x, grad):
    block.requires_grad_(False)  # the tracer takes no constants that need gradients
    result = torch.jit.trace(lambda x: block(x, LAYOUT), x, check_trace=False)(x)
    return result, torch.autograd.grad(result, x, grad)[0]


def negated(block, x, grad):
    result = block(torch._neg_view(-x), LAYOUT)
    return result, torch.autograd.grad(result, x, grad)[0]


def of_a_subclass(block, x, grad):
    class Tagged(torch.Tensor):
        pass

    result = block(x.as_subclass(Tagged), LAYOUT).as_subclass(torch.Tensor)
    return result, torch.autograd.grad(result, x, grad)[0]


def compiled(block, x, grad):
    result = torch.compile(lambda x: block(x, LAYOUT), backend="eager")(x)
    return result, torch.autograd.grad(result, x, grad)[0]


def with_inputs_in_memory(block, x, grad):
    memory = dph.Memory(4, "hidden")
    layout = memory.begin([len(x)])
    result = block(x, layout, memory.by_layer([len(x)])(0))
    return result, torch.autograd.grad(result, x, grad)[0]


CALLS = {
    "torch.func.vmap": (batched, "a torch.func transform is active"),
    "torch.jit.trace": (traced, "torch.jit traces the call"),
    "negated input": (negated, "a tensor is batched or negated lazily"),
    "subclass of the input": (of_a_subclass, "a tensor is a Tagged, not a plain tensor"),
    "torch.compile": (compiled, None),
    "memory of inputs": (with_inputs_in_memory, "the memory stores attention inputs"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("call", "reason"), CALLS.values(), ids=CALLS)
def test_calls_that_need_the_parts(call, reason, monkeypatch):
    block, forms = block_of(), []
    x, grad = given(block)
    layout = PackedLayout.documents([len(x)]) if call is with_inputs_in_memory else LAYOUT
    expected = block(x, layout)
    assert one_node(expected)

    def noted(*inputs):
        forms.append(block_form(*inputs))
        return forms[-1]

    if reason:  # PyTorch's compiler would trace the list
        monkeypatch.setattr(backbone, "block_form", noted)
    result, d_x = call(block, x, grad)
    assert not one_node(result)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(d_x, torch.autograd.grad(expected, x, grad)[0])
    assert not reason or all(not form.fused and reason in form.reason for form in forms)
    assert bool(forms) == bool(reason)


def test_a_block_without_numbers_is_taken_in_parts():
    block, layout = block_of().to("meta"), LAYOUT.to("meta")
    x = torch.empty(LAYOUT.queries, 16, dtype=torch.float64, device="meta")
    assert block_form(block, x, layout)[:2] == (False, "a tensor is on the meta device")
    assert block_form(block, x, LAYOUT)[:2] == (False, "the layout is on another device than x")


def test_tensors_that_do_not_fit_have_the_words_of_the_parts():
    block = block_of()
    x, _ = given(block)
    block.ffn_norm.float()
    assert block_form(block, x, LAYOUT)[:2] == (False, "ffn_norm has another dtype or device than x")
    with pytest.raises(ValueError, match="weight: expected float64, got float32"):
        block(x, LAYOUT)
    assert "queries and keys" in block_form(block, x, PackedLayout.documents([4, 5])).reason
    assert block_form(block, x[None], LAYOUT).reason == "x has 3 dimensions, not 2"
    block = block_of()
    block.attention.out.weight = nn.Parameter(block.attention.out.weight[:, :8].contiguous())
    assert block_form(block, x, LAYOUT).reason == "out has shape [16, 8], not [16, 16]"
    block = block_of()
    block.attention.heads = 3
    assert block_form(block, x, LAYOUT).reason == "qkv has shape [48, 16], not [56, 16]"


def test_gradient_checkpointing_takes_the_fused_block():
    model, found = Backbone(tiny_config()).double(), []
    embeddings = torch.randn(LAYOUT.queries, 12, dtype=torch.float64)
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        result = model(embeddings, LAYOUT)
        assert len(nodes(result)) == 2
        weights = [p for name, p in model.named_parameters() if name != "embedding.weight"]
        found.append([result, *torch.autograd.grad(result.square().sum(), weights)])
    assert all(map(torch.equal, *found))


def test_the_last_product_may_be_anything():
    block = block_of()
    x, _ = given(block)
    expected, seen = block(x, LAYOUT), []
    block.ffn.fc2 = nn.Sequential(block.ffn.fc2)
    block.ffn.fc2.register_forward_hook(lambda *_: seen.append(1))
    result = block(x, LAYOUT)
    assert one_node(result)
    assert seen
    assert torch.equal(result, expected)


def test_global_hooks_see_every_part():
    block, seen = block_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        block(given(block)[0], LAYOUT)
    finally:
        handle.remove()
    assert {"Linear", "LayerNorm", "Block"} <= set(seen)


def test_autocast_takes_it_in_parts():
    block = block_of(torch.float32)
    x, _ = given(block)
    with torch.autocast("cpu", torch.bfloat16):
        assert not one_node(block(x, LAYOUT))


def test_few_elements_are_left_to_pytorch(monkeypatch):
    block = block_of()
    x, _ = given(block)
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", x.numel())
    assert not one_node(block(x, LAYOUT))
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", x.numel() - 1)
    assert one_node(block(x, LAYOUT))


def test_compiled_blocks_are_taken_in_parts(inductor):
    model = Backbone(tiny_config())
    x, _ = given(model.blocks[0])
    compile.switch_on(model)
    assert not nodes(model.blocks[0](x, LAYOUT))
    compile.switch_off(model)
    assert nodes(model.blocks[0](x, LAYOUT))


def test_checkpointing_leaves_out_the_last_product():
    block = block_of()
    x, grad = given(block)
    finished = []
    block.ffn.fc2.register_forward_hook(lambda *_: finished.append(1))
    checkpoint(block, x, LAYOUT, use_reentrant=False).backward(grad)
    assert finished == [1]


def test_a_layout_of_other_sizes_has_its_own_words():
    block = block_of()
    x, _ = given(block)
    with pytest.raises(ValueError, match=r"q: expected shape"):
        block(x, PackedLayout.documents([4, 5]))
    with pytest.raises(ValueError, match=r"memory\[0\]: expected shape"):
        block(x, PackedLayout.with_memory([len(x)], [7], 7))
    with pytest.raises(ValueError, match=r"weight: expected shape"):
        block(torch.cat([x, x], 1), LAYOUT)


def test_a_memory_of_another_dtype_has_its_own_words():
    model, memory = dph.Model(tiny_config()), dph.Memory(6)
    ids = torch.arange(10).reshape(2, 5) + 4
    model(ids, past_key_values=memory)
    with pytest.raises(ValueError, match=r"memory\[0\]: expected float64, got float32"):
        model.double()(ids, past_key_values=memory)
