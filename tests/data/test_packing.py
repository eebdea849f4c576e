"""Packed answers against every sequence alone: hidden states, log-probabilities, rewards and all gradients."""

import copy
import itertools
import random

import pytest
import torch
from helpers.tiny import FORMS, VOCAB, tiny_model, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dph
from dph.chat import Encoded
from dph.data.packing import fill, packed_length
from dph_kernels import PackedLayout, dispatch

pytestmark = pytest.mark.usefixtures("every_kernel")


def encoded(ids, seed, *, trained=0.5, scored=0.3, finished=True):
    """Arbitrary masks and targets: the arithmetic does not need those of a conversation."""
    generator = torch.Generator().manual_seed(seed)

    def mask(share):
        return (torch.rand(len(ids), generator=generator) < share).tolist()

    return Encoded(
        tokens=ids,
        targets=torch.randint(VOCAB, (len(ids),), generator=generator).tolist(),
        loss_mask=mask(trained),
        score_mask=mask(scored),
        reward_position=int(torch.randint(len(ids), (), generator=generator)) if finished else None,
    )


@st.composite
def alternatives(draw):
    """1 to 6 branches of 1 to 70 tokens: any beginning in common, identical ones and prefixes of others included."""
    seed = draw(st.integers(0, 2**16))
    base = tokens(draw(st.integers(1, 70)), seed=seed).tolist()
    branches = [base]
    for i in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["branch", "identical", "prefix", "alone"]))
        other = branches[draw(st.integers(0, i))]
        cut = 0 if kind == "alone" else draw(st.integers(1, len(other)))
        if kind == "branch":
            tail = tokens(draw(st.integers(0, 70 - cut)), seed=seed + i + 1).tolist()
            branches.append(other[:cut] + tail)
        else:
            own = tokens(draw(st.integers(1, 70)), seed=seed + i + 1).tolist()
            branches.append({"identical": list(other), "prefix": other[:cut], "alone": own}[kind])
    return [
        encoded(ids, seed + 100 + i, trained=draw(st.sampled_from([0.0, 0.5])), finished=draw(st.booleans()))
        for i, ids in enumerate(branches)
    ]


def alone(model, item):
    """Results of one answer whose sequence is run alone: logits, sum, mean, rewards."""
    ids = torch.tensor([item.tokens])
    logits = model(ids).logits[0]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(item.targets)[:, None]).flatten()
    mask, scored = torch.tensor(item.loss_mask), torch.tensor(item.score_mask)
    rewards = {name: logits.new_tensor(float("nan")) for name in model.head_names}
    if item.reward_position is not None:
        rewards = {n: r[0] for n, r in model.rewards(ids, None, torch.tensor([item.reward_position])).items()}
    return logits, chosen[mask].sum(), chosen[scored].mean(), rewards


def packed_rows(documents):
    """Rows of each alternative's tokens among the packed tokens, in order."""
    start = 0
    for document in documents:
        sequences = [a.tokens for a in document]
        shared = next((i for i, c in enumerate(zip(*sequences, strict=False)) if len(set(c)) > 1),
                      min(map(len, sequences)))  # fmt: skip
        at = start + shared
        for sequence in sequences:
            end = at + len(sequence) - shared
            yield [*range(start, start + shared), *range(at, end)]
            at = end
        start = at


def gradients(model, results):
    """{"gradient NAME": tensor} of a weighted sum of all results but the logits, with different weights."""
    values = torch.cat([value.reshape(-1) for name, value in results.items() if not name.startswith("logits")])
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(0)).to(values.dtype)
    scalar = (values * weights)[~values.isnan()].sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(scalar, parameters, allow_unused=True, materialize_grads=True)
    return {f"gradient {name}": grad for name, grad in zip(names, grads, strict=True)}


HEADS = {"reward_heads": ("default", "other"), "task_heads": ("task",)}
MODELS = {name: tiny_model(**form, **HEADS) for name, form in ({"dph": {}} | FORMS).items()}
EXACT = {name: copy.deepcopy(model).double() for name, model in MODELS.items()}
MODEL = MODELS["dph"]


def separately(model, documents):
    """All compared results, from every sequence run alone."""
    answers = list(itertools.chain(*documents))
    logits, sums, means, rewards = zip(*(alone(model, item) for item in answers), strict=True)
    results = {f"logits {i}": own for i, own in enumerate(logits)}
    results |= {"logprobs": torch.stack(sums), "mean_logprobs": torch.stack(means)}
    results |= {f"reward {name}": torch.stack([own[name] for own in rewards]) for name in model.head_names}
    return results | gradients(model, results)


def packed(model, documents):
    """The same from one packed batch."""
    batch = dph.pack(documents)
    out = model.forward_packed(batch)
    hidden = model.backbone(batch.tokens, batch.layout)
    logits = model.lm_head(model.output_proj(hidden))
    results = {}
    for i, (rows, item) in enumerate(zip(packed_rows(documents), itertools.chain(*documents), strict=True)):
        assert batch.tokens[rows].tolist() == item.tokens
        results[f"logits {i}"] = logits[rows]
    results |= {"logprobs": out.logprobs, "mean_logprobs": out.mean_logprobs}
    results |= {f"reward {name}": own for name, own in out.rewards.items()}
    return results | gradients(model, results)


@pytest.mark.parametrize("few", [0, 2**17])
def test_a_policy_and_its_reference_begin_with_the_same_bits(few, monkeypatch):
    """Log-probabilities with gradients and without them, by kernels and by plain PyTorch."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", few)
    model = tiny_model()
    batch = dph.pack([[encoded(list(range(3, 3 + n)), seed=n) for n in (7, 12)] for _ in range(3)])
    policy = model.forward_packed(batch)
    with torch.no_grad():
        reference = model.forward_packed(batch)
    assert policy.logprobs.requires_grad
    assert torch.equal(policy.logprobs, reference.logprobs)


def largest_error(got, want):
    assert torch.equal(got.isnan(), want.isnan())
    return (got - want).abs().nan_to_num(0.0).max().item() if want.numel() else 0.0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(alternatives(), min_size=1, max_size=2), st.sampled_from(sorted(MODELS)))
def test_packed_equals_every_sequence_alone(documents, name_of_model):
    """The sequences alone in fp64 are the truth. Packed, fp64 is within 1e-11 of it, fp32 within 1e-5 of the largest.

    If rounding is larger (one packing in some thousands), fp32 may err twice as far as the sequences alone in fp32.
    """
    model, in_fp64 = MODELS[name_of_model], EXACT[name_of_model]
    truth, exact, single = separately(in_fp64, documents), packed(in_fp64, documents), packed(model, documents)
    assert truth.keys() == exact.keys() == single.keys()
    steepest = max(1e-3, *(truth[name].abs().max().item() for name in truth if name.startswith("gradient")))
    for name, want in truth.items():
        magnitude = want.abs().nan_to_num(0.0).max().item() if want.numel() else 0.0
        scale = steepest if name.startswith("gradient") else max(1.0, magnitude)
        assert largest_error(exact[name], want) <= 1e-11 * scale, name
        error = largest_error(single[name], want)
        if error > 1e-5 * scale:
            earned = largest_error(separately(model, documents)[name], want)
            assert error <= 2 * earned + 1e-5 * scale, f"{name}: {error:.2e} of {scale:.2e}"


def test_the_strategy_draws_what_it_promises():
    """Identical branches, and branches that are prefixes of others, tested explicitly."""
    a, b = tokens(9, seed=1).tolist(), tokens(5, seed=2).tolist()
    documents = [[encoded(ids, i) for i, ids in enumerate([a, a, a[:4], a[:4] + b, a[:1], b])],
                 [encoded([7], 8), encoded([7], 9)], [encoded(a + b, 10, finished=False)]]  # fmt: skip
    for name in MODELS:
        test_packed_equals_every_sequence_alone.hypothesis.inner_test(documents, name)


# Contents of a batch


def simple(ids, *, predicted, at=None):
    """An alternative whose masks are on at ``predicted``."""
    mask = [i in predicted for i in range(len(ids))]
    return Encoded(ids, [*ids[1:], 0], mask, mask, at)


def test_a_pair_laid_out_by_hand():
    chosen = simple([0, 5, 6, 7, 8, 3], predicted=(2, 3, 4), at=5)
    rejected = simple([0, 5, 6, 9, 3], predicted=(2, 3), at=None)
    other = simple([0, 4, 3], predicted=(), at=2)
    batch = dph.pack([[chosen, rejected], [other]])
    assert batch.tokens.tolist() == [0, 5, 6, 7, 8, 3, 9, 3, 0, 4, 3]
    assert batch.layout.segments[:, :2].tolist() == [[0, 3], [3, 6], [6, 8], [8, 11], [11, 11]]
    assert batch.rows.tolist() == [2, 3, 4, 2, 6]
    assert batch.targets.tolist() == [7, 8, 3, 9, 3]
    assert batch.answers.tolist() == [0, 0, 0, 1, 1]
    assert batch.reward_rows.tolist() == [5, -1, 10]
    assert batch.documents.tolist() == [0, 0, 1]
    assert batch.trained.tolist() == batch.scored.tolist() == [True] * 5


def by_hand(documents):
    """Contents of a batch of ``documents``, as lists, token by token."""
    held = {name: [] for name in ("tokens", "rows", "targets", "answers", "trained", "scored", "reward_rows",
                                  "documents")}  # fmt: skip
    rows = list(packed_rows(documents))
    held["tokens"] = [None] * (1 + max(itertools.chain([-1], *rows)))
    owned = [(d, item) for d, document in enumerate(documents) for item in document]
    for answer, (own, (d, item)) in enumerate(zip(rows, owned, strict=True)):
        for i, row in enumerate(own):
            held["tokens"][row] = item.tokens[i]
            if item.loss_mask[i] or item.score_mask[i]:
                values = row, item.targets[i], answer, item.loss_mask[i], item.score_mask[i]
                for name, value in zip(("rows", "targets", "answers", "trained", "scored"), values, strict=True):
                    held[name].append(value)
        held["reward_rows"].append(-1 if item.reward_position is None else own[item.reward_position])
        held["documents"].append(d)
    return held


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(alternatives(), max_size=5))
def test_a_batch_is_what_it_is_by_hand(documents):
    batch, held = dph.pack(documents), by_hand(documents)
    for name, values in held.items():
        tensor = getattr(batch, name)
        assert tensor.tolist() == values, name
        assert tensor.dtype == (torch.bool if name in ("trained", "scored") else torch.int64), name
        assert tensor.is_contiguous(), name
    sequences = [[item.tokens for item in document] for document in documents]
    assert torch.equal(batch.layout.segments, PackedLayout.from_sequences(sequences).segments)
    assert batch.layout.key_positions is batch.layout.query_positions


def test_rows_that_nothing_asks_for_are_left_out():
    item = Encoded([4, 5, 6, 7], [5, 6, 7, 0], [False, True, True, False], [False, False, True, False], None)
    batch = dph.pack([[item]])
    assert (batch.rows.tolist(), batch.trained.tolist(), batch.scored.tolist()) == ([1, 2], [True] * 2, [False, True])


def test_a_reward_in_the_shared_part_is_read_once_for_each():
    long, short = simple([4, 5, 6], predicted=(0,), at=2), simple([4, 5], predicted=(0,), at=1)
    batch = dph.pack([[long, short]])
    assert batch.reward_rows.tolist() == [2, 1]
    rewards = MODEL.forward_packed(batch).rewards["default"]
    assert rewards[1].item() == pytest.approx(alone(MODEL, short)[3]["default"].item(), abs=1e-5)


def test_nothing_to_pack():
    batch = dph.pack([])
    out = MODEL.forward_packed(batch)
    assert out.logprobs.shape == out.mean_logprobs.shape == out.rewards["default"].shape == (0,)
    assert batch.layout.queries == 0


def test_no_targets_and_no_finished_answer():
    out = MODEL.forward_packed(dph.pack([[simple([4, 5], predicted=(), at=None)]]))
    assert out.logprobs.tolist() == [0.0]
    assert out.mean_logprobs.isnan().all()
    assert out.rewards["default"].isnan().all()


def test_an_answer_without_content_spoils_no_gradient():
    """Its mean is 0/0. Neither that nor a cut-off answer's reward may reach the weights."""
    empty = Encoded([4, 5, 3], [5, 3, 0], [False, True, False], [False] * 3, None)
    model = tiny_model()
    out = model.forward_packed(dph.pack([[empty, simple([4, 5, 6], predicted=(1,), at=2)]]))
    assert out.mean_logprobs.isnan().tolist() == [True, False]
    assert out.rewards["default"].isnan().tolist() == [True, False]
    (out.logprobs.sum() + out.mean_logprobs[1] + out.rewards["default"][1]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[]], r"documents\[0\]: expected alternatives of at least one token each, got \[\]"),
        ([[encoded([4], 0)], [Encoded([], [], [], [], None)]], r"documents\[1\]: expected alternatives"),
        (
            [[Encoded([4, 5], [5, 0], [True, False], [True], None)]],
            r"documents\[0\]: .* one length, got 2, 2, 2 and 1",
        ),
    ],
)
def test_documents_that_cannot_be_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        dph.pack(documents)


def test_a_batch_moves_whole():
    batch = dph.pack([[encoded([4, 5, 6], 0), encoded([4, 7], 1)]])
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.layout.query_positions.device.type, moved.reward_rows.device.type,
            moved.trained.device.type} == {"meta"}  # fmt: skip
    back = batch.to("cpu")
    assert torch.equal(back.rows, batch.rows)
    assert back.layout is batch.layout


# Dropout


def test_dropout_masks_belong_to_answers_not_to_batches():
    """Split for gradient accumulation, a batch keeps its masks; another seed gives others."""
    model = tiny_model(reward_dropout=0.5).train()
    pairs = [
        [encoded(tokens(9, seed=i).tolist(), i), encoded(tokens(7, seed=i + 50).tolist(), i + 50)] for i in range(4)
    ]
    whole = model.forward_packed(dph.pack(pairs), dropout_seed=5).rewards["default"]
    parts = [
        model.forward_packed(dph.pack(pairs[i : i + 2]), dropout_seed=5, answer_ids=torch.arange(2 * i, 2 * i + 4))
        for i in (0, 2)
    ]
    torch.testing.assert_close(torch.cat([p.rewards["default"] for p in parts]), whole)
    assert not torch.equal(model.forward_packed(dph.pack(pairs), dropout_seed=6).rewards["default"], whole)
    drawn = [model.forward_packed(dph.pack(pairs)).rewards["default"] for _ in range(2)]
    assert not torch.equal(*drawn)
    model.eval()
    assert torch.equal(*(model.forward_packed(dph.pack(pairs), dropout_seed=s).rewards["default"] for s in (5, 6)))


def test_cut_off_answers_do_not_shift_the_masks():
    model = tiny_model(reward_dropout=0.5).train()
    items = [encoded(tokens(6, seed=i).tolist(), i) for i in range(3)]
    cut = [items[0], encoded(items[1].tokens, 1, finished=False), items[2]]
    whole, holed = (model.forward_packed(dph.pack([[i] for i in group]), dropout_seed=1).rewards["default"]
                    for group in (items, cut))  # fmt: skip
    torch.testing.assert_close(holed[[0, 2]], whole[[0, 2]])


# Bins


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_fill_puts_everyone_somewhere(sizes, room):
    bins = fill(sizes, room)
    assert sorted(i for found in bins for i in found) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in found) <= room for found in bins)
    assert all(found == sorted(found) for found in bins)
    assert bins == sorted(bins) == fill(sizes, room)


def test_fill_leaves_little_room():
    """Mixed lengths, as of real pairs: every bin but the last is at least 95 % full, and so are all together."""
    rng = random.Random(0)
    sizes = [min(2048, max(8, round(rng.lognormvariate(5, 1)))) for _ in range(2000)]
    bins = fill(sizes, 4096)
    assert sum(sizes) / (len(bins) * 4096) > 0.95
    assert len(bins) == -(-sum(sizes) // 4096)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="sizes: expected at most 10 each, got 11"):
        fill([3, 11], 10)
    assert fill([], 10) == []


def test_packed_length():
    alternatives = [encoded([1, 2, 3, 4], 0), encoded([1, 2, 5], 1), encoded([1, 2, 3], 2)]
    assert packed_length(alternatives) == len(dph.pack([alternatives]).tokens)


@pytest.mark.parametrize("position", [-1, 3, 10])
def test_a_reward_position_outside_of_the_answer(position):
    tokens, flags = [5, 6, 7], [False, True, True]
    answer = Encoded(tokens, [6, 7, 0], flags, flags, position)
    with pytest.raises(ValueError, match=rf"documents\[0\]: expected 0 <= reward_position < 3, got {position}"):
        dph.pack([[answer]])
