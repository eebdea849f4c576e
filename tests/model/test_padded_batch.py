"""Dense batches: padding, documents in a row, embeddings, labels and what a call gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import VOCAB, padded, tiny_model, tokens

import dph

pytestmark = pytest.mark.usefixtures("every_kernel")


def test_padding_on_either_side_changes_nothing():
    model = tiny_model()
    rows = [tokens(n, seed=n).tolist() for n in (9, 4, 1)]
    ids, mask = padded((0, rows[0], 0), (5, rows[1], 0), (3, rows[2], 5))
    logits = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        own = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[b][mask[b].bool()], own, rtol=0, atol=1e-5)
    assert (logits[mask == 0] == 0).all()


def test_a_mask_of_ones_and_one_of_booleans():
    model, ids = tiny_model(), tokens(2, 6)
    expected = model(ids).logits
    for mask in (torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 11, dtype=torch.int64)):
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("mask", [[0.0, 0, 0, 0, 0, -1e9], [1, 1, 1, 2, 2, 2]], ids=["added", "documents"])
def test_masks_of_another_kind_are_refused(mask):
    model, ids = tiny_model(), tokens(2, 6)
    with pytest.raises(ValueError, match="attention_mask: expected 1 for tokens and 0 for padding, got other values"):
        model(ids, attention_mask=torch.tensor(mask).expand(2, 6))


def test_positions_that_begin_anew_divide_a_row_into_documents():
    """Under a mask too: padding lies on either side, and between documents."""
    model = tiny_model()
    rows = [tokens(n, seed=n).tolist() for n in (5, 3, 4, 2)]
    ids, mask = padded((2, [*rows[0], *rows[1]], 1), (0, [*rows[2], 0, *rows[3]], 4))
    mask[1, 4] = 0
    positions = torch.tensor([[1, 1, 0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 3, 9, 0, 1, 0, 0, 0, 0]])
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for b, start, row in ((0, 2, rows[0]), (0, 7, rows[1]), (1, 0, rows[2]), (1, 5, rows[3])):
        own = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[b, start : start + len(row)], own, rtol=0, atol=1e-5)
    assert torch.equal(model(ids, position_ids=torch.arange(11)[None]).logits, model(ids).logits)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert model(empty, position_ids=empty).logits.shape == (2, 0, VOCAB)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ([[0, 1, 1, 2]], r"predecessor's plus 1, or 0 at the start of a document, got 1 after 1"),
        ([[0, 1, 2, 4]], "got 4 after 2"),
        ([[3, 2, 1, 0]], "got 2 after 3"),
        ([[0, 1, 2]], r"position_ids: expected shape \[2, 4\], got \[1, 3\]"),
        ([0, 1, 2, 3], r"position_ids: expected shape \[2, 4\], got \[4\]"),
        ([[0.0, 1, 2, 3]], "position_ids: expected int32 or int64, got float32"),
    ],
)
def test_positions_that_cannot_be(positions, text):
    with pytest.raises(ValueError, match=text):
        tiny_model()(tokens(2, 4), position_ids=torch.tensor(positions))


def test_documents_do_not_share_a_memory():
    model, ids, several = tiny_model().eval(), tokens(2, 4), torch.tensor([[0, 1, 0, 1]])
    text = "position_ids: expected one document in each row with a memory, got 4 in 2 rows"
    for arguments in ({"use_cache": True}, {"past_key_values": dph.Memory(8)}):
        with pytest.raises(ValueError, match=text):
            model(ids, position_ids=several, **arguments)
    with pytest.raises(ValueError, match=text):
        model.generate(ids, position_ids=several.expand(2, 4), max_new_tokens=1)
    memory = dph.Memory(8)
    model(ids, past_key_values=memory)
    model(ids, past_key_values=memory, position_ids=torch.arange(4, 8)[None])


def test_embeddings_in_place_of_tokens():
    model, (ids, mask) = tiny_model(), padded((0, [5, 6, 7], 1), (1, [8, 9, 4], 0))
    given = model.get_input_embeddings()(ids)
    arguments = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    out, expected = model(inputs_embeds=given, **arguments), model(ids, **arguments)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    for both in ({}, {"input_ids": ids, "inputs_embeds": given}):
        with pytest.raises(ValueError, match=r"input_ids, inputs_embeds: expected one, got (none|both)"):
            model(**both)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \[B, S, \d+\], got \[2, 4, 1\]"):
        model(inputs_embeds=given[..., :1])


def test_hidden_states_are_the_blocks_inputs_and_the_result():
    model, (ids, mask) = tiny_model(), padded((0, [5, 6, 7], 1), (1, [8, 9, 4], 0))
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    for state, rows in zip(states, seen, strict=False):
        assert torch.equal(state[mask.bool()], rows)
    assert (torch.stack(states)[:, mask == 0] == 0).all()
    logits = model.output_proj(states[-1]) @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(states)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1)])
def test_empty_batches_and_single_tokens(shape):
    model, ids = tiny_model(), tokens(*shape)
    assert model(ids).logits.shape == (*shape, VOCAB)
    assert model(ids, attention_mask=torch.ones(shape, dtype=torch.int64)).logits.shape == (*shape, VOCAB)
    assert model(ids, attention_mask=torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, VOCAB)
    assert model(ids, labels=ids).loss.isnan()  # nothing to predict: torch's cross-entropy says so as well


@pytest.mark.parametrize("divisor", [None, 7, torch.tensor(7)])
def test_loss_is_the_cross_entropy_of_the_shifted_labels(divisor):
    model, ids = tiny_model(), tokens(3, 12)
    labels = ids.clone()
    labels[0, :5], labels[2] = -100, -100
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(logits, targets)
    if divisor is not None:
        expected = F.cross_entropy(logits, targets, reduction="sum") / 7
    out = model(ids, labels=labels, num_items_in_batch=divisor)
    torch.testing.assert_close(out.loss, expected)
    names = [n for n, _ in model.named_parameters() if not n.startswith("heads.")]
    parameters = [model.get_parameter(n) for n in names]
    grads = torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters)
    for name, got, want in zip(names, *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_of_a_padded_batch_is_that_of_its_rows():
    model = tiny_model()
    rows = [tokens(n, seed=n).tolist() for n in (9, 4)]
    ids, mask = padded((0, rows[0], 0), (2, rows[1], 3))
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 2] = -100  # predicted from padding
    loss = model(ids, attention_mask=mask, labels=labels).loss
    sums = [
        F.cross_entropy(model(torch.tensor([r])).logits[0, :-1], torch.tensor(r[1:]), reduction="sum") for r in rows
    ]
    torch.testing.assert_close(loss, sum(sums) / 11)


def test_logits_to_keep():
    model, ids = tiny_model(), tokens(2, 9)
    whole = model(ids, labels=ids)
    for keep, columns in ((0, slice(None)), (1, slice(-1, None)), (4, slice(-4, None)), (torch.tensor([2, 7]), [2, 7])):
        out = model(ids, labels=ids, logits_to_keep=keep)
        torch.testing.assert_close(out.logits, whole.logits[:, columns])
        assert torch.equal(out.loss, whole.loss)


def test_forms_of_the_output():
    model, ids = tiny_model(), tokens(1, 4)
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, dph.Memory)
    memory = dph.Memory(8)
    out = model(ids, past_key_values=memory, return_dict=False)
    assert out[1] is memory
    (logits,) = model(ids, return_dict=False)
    torch.testing.assert_close(logits, out[0])
    assert torch.equal(model(ids, return_dict=None).logits, logits)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], logits)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"input_ids": tokens(4)}, r"input_ids: expected shape \[B, S\], got \[4\]"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: expected shape \[2, 4\] or wider, got \[2, 3\]"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: expected shape \[2, 4\]"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask: expected shape \[2, 4\]"),
        ({"labels": tokens(2, 5)}, r"labels: expected shape \[2, 4\], got \[2, 5\]"),
        ({"labels": torch.full((2, 4), VOCAB)}, rf"labels: expected tokens in \[0, {VOCAB}\), got {VOCAB}"),
        ({"labels": torch.ones(2, 4)}, "labels: expected int64, got float32"),
        ({"input_ids": torch.full((2, 4), VOCAB)}, rf"input_ids: expected tokens in \[0, {VOCAB}\), got {VOCAB}"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids: expected tokens .*, got -1"),
        ({"input_ids": torch.ones(2, 4)}, "input_ids: expected int32 or int64, got float32"),
        ({"input_ids": [[1, 2]]}, "input_ids: expected a tensor, got list"),
    ],
)
def test_shapes_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        tiny_model()(**({"input_ids": tokens(2, 4)} | arguments))


def test_compiled_with_positions():
    """NumPy reads them, past the compiler; ``generate`` gives them of itself."""
    model, ids = tiny_model().eval(), tokens(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    expected = model(ids, position_ids=positions).logits
    said = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
    run = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(ids, position_ids=positions).logits, expected)
    model.forward = torch.compile(model.forward, backend="eager")
    again = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
    assert torch.equal(again, said)


def test_rows_by_vmap():
    model, ids = tiny_model(), tokens(3, 5)
    rows = torch.func.vmap(lambda row: model(row[None]).logits[0])(ids)
    torch.testing.assert_close(rows, model(ids).logits)


@pytest.mark.parametrize("wrong", [torch.full((2, 4), VOCAB), torch.ones(2, 4), tokens(2, 5)])
def test_wrong_labels_leave_a_memory_as_it_was(wrong):
    model, memory = tiny_model(), dph.Memory(8)
    model(tokens(2, 4), past_key_values=memory)
    with pytest.raises(ValueError, match="labels: expected"):
        model(tokens(2, 4), labels=wrong, past_key_values=memory)
    assert memory.seen == [4, 4]
