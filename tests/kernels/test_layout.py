"""PackedLayout against visibility that is written down token by token, its errors, and its pictures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dph_kernels import PackedLayout, Rotary, rope_attention
from dph_kernels.layout import COLUMNS, LinearScaling, Llama3Scaling, YarnScaling, common_prefix

SMALL = settings(max_examples=60, deadline=None)
LENGTHS = st.lists(st.integers(0, 6), max_size=5)


def mask_of(queries, keys, sees):
    """[T, S] bool from a predicate over the labels of a query and of a key."""
    mask = [[sees(q, k) for k in keys] for q in queries]
    return torch.tensor(mask, dtype=torch.bool).reshape(len(queries), len(keys))


# Constructors


@SMALL
@given(LENGTHS)
def test_documents_are_causal_and_alone(lengths):
    layout = PackedLayout.documents(lengths)
    tokens = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert torch.equal(layout.visible(), mask_of(tokens, tokens, lambda q, k: q[0] == k[0] and k[1] <= q[1]))
    assert layout.query_positions.tolist() == layout.key_positions.tolist() == [i for _, i in tokens]
    assert (layout.queries, layout.keys, layout.memory) == (len(tokens), len(tokens), 0)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (1, 1), (2, 7)])
def test_dense_is_documents_of_one_length(batch, length):
    dense, documents = PackedLayout.dense(batch, length), PackedLayout.documents([length] * batch)
    assert torch.equal(dense.segments, documents.segments)
    assert dense.visible().shape == (batch * length, batch * length)


@SMALL
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=4)), max_size=3))
def test_branches_see_the_prompt_and_themselves(documents):
    layout = PackedLayout.shared_prefix([p for p, _ in documents], [b for _, b in documents])
    tokens = []  # (document, branch or None, place in the sequence)
    for d, (prompt, branches) in enumerate(documents):
        tokens += [(d, None, i) for i in range(prompt)]
        tokens += [(d, b, prompt + i) for b, n in enumerate(branches) for i in range(n)]

    def sees(q, k):
        return q[0] == k[0] and k[1] in (None, q[1]) and k[2] <= q[2]

    assert torch.equal(layout.visible(), mask_of(tokens, tokens, sees))
    assert layout.query_positions.tolist() == layout.key_positions.tolist() == [i for *_, i in tokens]


@SMALL
@given(st.lists(st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=4), max_size=3))
def test_every_alternative_sees_exactly_its_own_beginning(documents):
    """Walk every alternative through the packed tokens and compare with the causal mask of the sequence alone."""
    layout, start = PackedLayout.from_sequences(documents), 0
    mask = layout.visible()
    seen_rows = set()
    for alternatives in documents:
        shared = max(n for n in range(6) if len({tuple(a[:n]) for a in alternatives if len(a) >= n}) == 1
                     and all(len(a) >= n for a in alternatives))  # fmt: skip
        rest = start + shared
        for alternative in alternatives:
            places = [*range(start, start + shared), *range(rest, rest + len(alternative) - shared)]
            rest += len(alternative) - shared
            for i, place in enumerate(places):
                assert mask[place].nonzero().flatten().tolist() == places[: i + 1]
                assert layout.query_positions[place] == i
            seen_rows.update(places)
        start = rest
    assert seen_rows == set(range(layout.queries))


@pytest.mark.parametrize(
    ("alternatives", "prompt", "branches"),
    [
        ([[1, 2, 3], [1, 2, 3]], 3, [0, 0]),  # identical
        ([[1, 2], [1, 2, 3, 4]], 2, [0, 2]),  # one a prefix of another
        ([[1, 2, 3], [4, 5]], 0, [3, 2]),  # nothing in common
        ([[7, 8]], 2, [0]),  # one alternative
        ([[], [1]], 0, [0, 1]),  # an empty one
        ([[], []], 0, [0, 0]),
    ],
)
def test_longest_common_prefix_becomes_the_prompt(alternatives, prompt, branches):
    assert common_prefix(alternatives) == prompt
    expected = PackedLayout.shared_prefix([prompt], [branches])
    assert torch.equal(PackedLayout.from_sequences([alternatives]).segments, expected.segments)


@SMALL
@given(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=4), st.lists(st.integers(0, 9)))
def test_a_prefix_is_as_long_as_token_by_token(rests, prompt):
    alternatives = [prompt + rest for rest in rests]
    equal = [len(set(tokens)) == 1 for tokens in zip(*alternatives, strict=False)]
    assert common_prefix(alternatives) == [*equal, False].index(False)


@SMALL
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 9)), max_size=4))
def test_streams_see_their_filled_memory_and_themselves(streams):
    capacity = 3
    lengths, filled, extra = ([s[i] for s in streams] for i in range(3))
    seen = [f + e for f, e in zip(filled, extra, strict=True)]
    layout = PackedLayout.with_memory(lengths, filled, capacity, seen)
    tokens = [(b, i) for b, n in enumerate(lengths) for i in range(n)]
    cached = [(b, i - capacity) for b in range(len(streams)) for i in range(capacity)]

    def sees(q, k):
        return q[0] == k[0] and (k[1] + capacity < filled[q[0]] if k[1] < 0 else k[1] <= q[1])

    assert torch.equal(layout.visible(), mask_of(tokens, cached + tokens, sees))
    assert layout.query_positions.tolist() == layout.key_positions.tolist() == [seen[b] + i for b, i in tokens]
    assert layout.memory == capacity * len(streams)


def test_without_seen_the_memory_holds_all_that_was_seen():
    assert PackedLayout.with_memory([2, 1], [3, 0], 4).query_positions.tolist() == [3, 4, 0]


@SMALL
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 9)), max_size=4))
def test_more_keys_than_queries_align_at_the_end(streams):
    layout = PackedLayout.aligned(
        [n for n, _, _ in streams], [n + older for n, older, _ in streams], [first for *_, first in streams]
    )
    queries = [(b, first + older + i) for b, (n, older, first) in enumerate(streams) for i in range(n)]
    keys = [(b, first + i) for b, (n, older, first) in enumerate(streams) for i in range(n + older)]
    assert torch.equal(layout.visible(), mask_of(queries, keys, lambda q, k: q[0] == k[0] and k[1] <= q[1]))
    assert layout.query_positions.tolist() == [p for _, p in queries]
    expected = [p if streams[b][0] else 0 for b, p in keys]  # keys of a stream without queries are never looked at
    assert [
        p if streams[b][0] else 0 for p, (b, _) in zip(layout.key_positions.tolist(), keys, strict=True)
    ] == expected


def test_aligned_with_fewer_keys_than_queries_hides_all_from_the_first():
    layout = PackedLayout.aligned([3], [2], [5])
    assert layout.visible().tolist() == [[False, False], [True, False], [True, True]]
    assert layout.query_positions.tolist() == [4, 5, 6]
    assert layout.key_positions.tolist() == [5, 6]


@SMALL
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=3)), max_size=3))
def test_candidates_see_the_cached_prompt_and_what_they_have_said(documents):
    capacity = 3
    layout = PackedLayout.decode([p for p, _ in documents], [said for _, said in documents], capacity)
    cache = []  # (document, candidate or None, place in the sequence)
    for d, (prompt, said) in enumerate(documents):
        cache += [(d, None, i) for i in range(prompt)]
        cache += [(d, c, prompt + i) for c in range(len(said)) for i in range(capacity)]
    queries = [(d, c, p + n - 1) for d, (p, said) in enumerate(documents) for c, n in enumerate(said)]

    def sees(q, k):
        return q[0] == k[0] and k[1] in (None, q[1]) and k[2] <= q[2]

    assert torch.equal(layout.visible(), mask_of(queries, cache, sees))
    assert layout.query_positions.tolist() == [i for *_, i in queries]
    assert (layout.keys, layout.memory) == (0, len(cache))


def test_rows_outside_every_segment_are_padding():
    layout = PackedLayout(torch.tensor([[1, 3, 0, 2, 0, 0, 4]]), queries=5, keys=2)
    assert layout.visible().any(1).tolist() == [False, True, True, False, False]
    assert layout.query_positions.tolist() == [0, 4, 5, 0, 0]


def test_an_empty_layout_is_a_layout():
    for layout in (PackedLayout.documents([]), PackedLayout.dense(0, 4), PackedLayout.decode([], [], 3),
                   PackedLayout.aligned([], []), PackedLayout.with_memory([], [], 5)):  # fmt: skip
        assert layout.segments.shape == (0, len(COLUMNS))
        assert layout.visible().shape == (0, 0)
        assert layout.explain() == "0 queries over 0 memory rows and 0 new keys\n"


# Validation


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(COLUMNS))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (table((0, 2, 0, 2, 0, 0, 0)).int(), r"segments: expected int64 \[G, 7\] on the CPU, got torch.int32 \[1, 7\]"),
        (torch.zeros(1, 6, dtype=torch.int64), r"segments: expected int64 \[G, 7\].*got torch.int64 \[1, 6\]"),
        (torch.zeros(7, dtype=torch.int64), r"segments: expected int64 \[G, 7\].*got torch.int64 \[7\]"),
        (table((0, 2, 0, 2, 0, 0, 0)).to("meta"), r"segments: expected int64 \[G, 7\] on the CPU"),
        (table((0, 6, 0, 4, 0, 0, 0)), r"segment 0: expected a query range within \[0, 5\], got \[0, 6\)"),
        (table((3, 2, 0, 4, 0, 0, 0)), r"segment 0: expected a query range within \[0, 5\], got \[3, 2\)"),
        (table((-1, 2, 0, 4, 0, 0, 0)), r"segment 0: expected a query range"),
        (table((0, 1, 0, 1, 0, 0, 0), (1, 2, 4, 9, 0, 0, 0)), r"segment 1: expected a key range within \[0, 8\]"),
        (table((0, 1, 0, 1, 7, 9, 0)), r"segment 0: expected a prefix range within \[0, 8\], got \[7, 9\)"),
        (table((0, 1, 0, 1, 0, 0, -3)), r"segment 0: expected position >= 0, got -3"),
        (
            table((0, 0, 2, 4, 3, 5, 0), (0, 2, 2, 5, 1, 3, 0)),  # key 2 would count twice; no queries, no matter
            r"segment 1: expected own and prefix keys apart, got \[2, 5\) and \[1, 3\)",
        ),
        (table((0, 2, 2, 6, 3, 4, 0)), r"segment 0: expected own and prefix keys apart"),  # the one within the other
        (table((0, 2, 3, 4, 2, 6, 0)), r"segment 0: expected own and prefix keys apart"),
        (
            table((3, 5, 0, 2, 0, 0, 0), (0, 4, 0, 4, 0, 0, 0)),
            r"segments 1 and 0: expected disjoint queries, both hold query 3",
        ),
        (
            table((0, 2, 2, 4, 0, 0, 0), (2, 4, 2, 4, 0, 0, 5)),  # the same new keys at positions 0 and 5
            r"new key 0: expected one position, got 0 and 5",
        ),
        (
            table((0, 2, 2, 4, 0, 0, 0), (2, 4, 4, 6, 2, 4, 7)),  # a prefix whose end is not where the branch begins
            r"new key \d: expected one position, got",
        ),
    ],
)
def test_tables_that_cannot_be_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout(segments, queries=5, keys=6, memory=2)


def test_memory_rows_may_serve_any_position():
    """Cached keys carry their rotation: two segments may share them at different distances."""
    layout = PackedLayout(table((0, 1, 2, 3, 0, 2, 9), (1, 2, 3, 4, 0, 2, 30)), queries=2, keys=2, memory=2)
    assert layout.key_positions.tolist() == [9, 30]


def test_a_prefix_that_reaches_from_memory_into_new_keys_keeps_its_positions():
    layout = PackedLayout(table((0, 2, 3, 5, 1, 3, 7)), queries=2, keys=3, memory=2)
    assert layout.key_positions.tolist() == [6, 7, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedLayout.documents([3, -1]), "expected a query range"),
        (lambda: PackedLayout.shared_prefix([1, 2], [[1]]), "branches: expected 2 entries, as many as prompts, got 1"),
        (lambda: PackedLayout.with_memory([1], [5], 4), r"filled\[0\]: expected at most capacity = 4, got 5"),
        (lambda: PackedLayout.with_memory([1], [-1], 4), "expected a prefix range"),
        (lambda: PackedLayout.with_memory([1, 1], [0], 4), "filled: expected 2 entries, as many as lengths, got 1"),
        (lambda: PackedLayout.with_memory([1], [0], 4, []), "seen: expected 1 entries"),
        (lambda: PackedLayout.aligned([1], [2, 2]), "keys: expected 1 entries"),
        (lambda: PackedLayout.aligned([1], [2], []), "first: expected 1 entries"),
        (lambda: PackedLayout.decode([2], [[1], [1]], 3), "said: expected 1 entries, as many as prompts, got 2"),
        (lambda: PackedLayout.decode([2], [[0]], 3), "said: expected 1 <= count <= capacity = 3, got 0"),
        (lambda: PackedLayout.decode([2], [[4]], 3), "said: expected 1 <= count <= capacity = 3, got 4"),
        (lambda: PackedLayout.from_sequences([[[1]], []]), r"documents\[1\]: expected at least one token sequence"),
    ],
)
def test_arguments_of_constructors_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Pictures


def test_a_preference_pair_drawn():
    assert PackedLayout.shared_prefix([3], [[2, 1]]).explain() == (
        "6 queries over 0 memory rows and 6 new keys\n"
        "segment 0: queries 0..2 at position 0 sees keys 0..2 causally\n"
        "segment 1: queries 3..4 at position 3 sees keys 3..4 causally and all of keys 0..2\n"
        "segment 2: queries 5..5 at position 3 sees keys 5..5 causally and all of keys 0..2\n"
        "\n"
        "#.....\n"
        "##....\n"
        "###...\n"
        "+++#..\n"
        "+++##.\n"
        "+++..#"
    )


def test_memory_drawn_left_of_a_bar():
    assert PackedLayout.with_memory([2, 1], [2, 1], 3, [7, 1]).explain() == (
        "3 queries over 6 memory rows and 3 new keys\n"
        "segment 0: queries 0..1 at position 7 sees keys 6..7 causally and all of keys 0..1\n"
        "segment 1: queries 2..2 at position 1 sees keys 8..8 causally and all of keys 3..3\n"
        "\n"
        "++....|#..\n"
        "++....|##.\n"
        "...+..|..#"
    )


def test_more_keys_than_queries_drawn():
    assert PackedLayout.aligned([2], [4]).explain() == (
        "2 queries over 0 memory rows and 4 new keys\n"
        "segment 0: queries 0..1 at position 2 sees keys 0..3 causally\n"
        "\n"
        "###.\n"
        "####"
    )


def test_decoding_drawn():
    assert PackedLayout.decode([2], [[1, 2]], 2).explain() == (
        "2 queries over 6 memory rows and 0 new keys\n"
        "segment 0: queries 0..0 at position 2 sees keys 2..2 causally and all of keys 0..1\n"
        "segment 1: queries 1..1 at position 3 sees keys 4..5 causally and all of keys 0..1\n"
        "\n"
        "++#...|\n"
        "++..##|"
    )


def test_nothing_to_see_drawn():
    assert PackedLayout.documents([1, 0, 1]).explain() == (
        "2 queries over 0 memory rows and 2 new keys\n"
        "segment 0: queries 0..0 at position 0 sees keys 0..0 causally\n"
        "segment 1: no queries\n"
        "segment 2: queries 1..1 at position 0 sees keys 1..1 causally\n"
        "\n"
        "#.\n"
        ".#"
    )
    alone = PackedLayout(table((0, 1, 0, 0, 0, 2, 2)), queries=2, keys=2)
    assert alone.explain().splitlines()[1:] == [
        "segment 0: queries 0..0 at position 2 sees no keys of its own and all of keys 0..1", "", "++", "..",
    ]  # fmt: skip


def test_large_layouts_are_told_not_drawn():
    layout = PackedLayout.documents([5])
    assert layout.explain(limit=4).splitlines()[-1] == "(too large to draw: more than 4 rows or columns)"
    assert layout.explain(limit=5).splitlines()[-1] == "#####"


@SMALL
@given(LENGTHS, st.data())
def test_the_picture_agrees_with_the_mask(lengths, data):
    filled = [data.draw(st.integers(0, 3)) for _ in lengths]
    layout = PackedLayout.with_memory(lengths, filled, 3)
    drawn = layout.explain().split("\n\n")[1] if layout.queries else ""
    squares = [[c in "#+" for c in line if c != "|"] for line in drawn.splitlines()]
    assert squares == layout.visible().tolist()


# Rotary tables


@pytest.mark.parametrize("start", [0, 10**7, 10**9])
@pytest.mark.parametrize("head_dim", [16, 64, 100])
def test_angles_are_right_however_far_the_positions_have_rolled(start, head_dim):
    """Against fifty digits. An angle that is a product in fp32 is wrong by half a radian at 10**7."""
    mpmath = pytest.importorskip("mpmath")
    positions = torch.arange(start, start + 3)
    cos, sin = Rotary(500_000.0).tables(positions, head_dim, torch.float64)
    with mpmath.workdps(50):
        angles = [[p * mpmath.mpf(500_000) ** (-mpmath.mpf(2 * i) / head_dim) for i in range(head_dim // 2)]
                  for p in positions.tolist()]  # fmt: skip
        want_cos = torch.tensor([[float(mpmath.cos(a)) for a in row] for row in angles], dtype=torch.float64)
        want_sin = torch.tensor([[float(mpmath.sin(a)) for a in row] for row in angles], dtype=torch.float64)
    allowed = max(start, 1) * 4 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(cos, want_cos, rtol=0, atol=allowed)
    torch.testing.assert_close(sin, want_sin, rtol=0, atol=allowed)
    for single, want in zip(Rotary().tables(positions, head_dim), (want_cos, want_sin), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), want, rtol=0, atol=1e-7 + allowed)


def test_tables_are_those_of_the_definition():
    cos, sin = Rotary(base=100.0).tables(torch.tensor([0, 3]), 4, torch.float64)
    angles = [0.0, 0.0, 3.0, 0.3]
    assert cos.flatten().tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-15)
    assert sin.flatten().tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-15)


def test_reversed_negates_every_angle():
    positions = torch.tensor([0, 1, 12_345])
    cos, sin = Rotary().tables(positions, 8)
    cos_reversed, sin_reversed = Rotary(reversed=True).tables(positions, 8)
    assert torch.equal(cos, cos_reversed)
    assert torch.equal(sin, -sin_reversed)


def test_tables_are_made_once_for_each_rotary_and_width():
    layout, rope = PackedLayout.shared_prefix([2], [[1]]), Rotary()
    first = layout.tables(rope, 8, torch.float32)
    assert layout.tables(Rotary(), 8, torch.float32) is first
    assert layout.tables(Rotary(base=10.0), 8, torch.float32) is not first
    assert layout.tables(rope, 8, torch.float64)[0].dtype == torch.float64
    assert [list(t.shape) for t in first] == [[3, 4]] * 4


def test_tables_made_in_inference_mode_serve_training():
    layout = PackedLayout.documents([3])
    with torch.inference_mode():
        layout.tables(Rotary(), 8, torch.float32)
    assert not any(t.is_inference() for t in layout.tables(Rotary(), 8, torch.float32))


# Devices


def test_positions_move_and_the_table_stays():
    layout = PackedLayout.shared_prefix([2], [[1, 1]])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert (moved.query_positions.device.type, moved.key_positions.device.type) == ("meta", "meta")
    assert moved.segments.device.type == "cpu"
    assert torch.equal(moved.segments, layout.segments)
    assert (moved.queries, moved.keys, moved.memory) == (layout.queries, layout.keys, layout.memory)
    assert layout.query_positions.device.type == "cpu"


def test_positions_of_queries_that_are_also_the_keys_are_one_tensor():
    layout, decoding = PackedLayout.shared_prefix([2], [[1, 1]]), PackedLayout.aligned([2], [3])
    for same in (layout, layout.to("meta")):
        assert same.key_positions is same.query_positions
    assert decoding.key_positions is not decoding.query_positions
    cos, sin, key_cos, key_sin = layout.tables(Rotary(), 8, torch.float32)
    assert key_cos is cos
    assert key_sin is sin


@pytest.mark.gpu
def test_positions_and_tables_on_the_gpu():
    layout = PackedLayout.with_memory([2], [3], 4, [10**7])
    moved = layout.to("cuda")
    assert moved.to("cuda") is moved
    assert moved.query_positions.cpu().tolist() == layout.query_positions.tolist()
    for on_gpu, on_cpu in zip(moved.tables(Rotary(), 64, torch.float32), layout.tables(Rotary(), 64, torch.float32),
                              strict=True):  # fmt: skip
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-7)


# Rotary embeddings for longer contexts

CONTEXT = {"original_max_position_embeddings": 512}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT}
YARN = {"factor": 4.0, **CONTEXT}


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "linear", "factor": 2.5}, LinearScaling(2.5)),
        ({"rope_type": "llama3", **LLAMA3}, Llama3Scaling(8.0, 512)),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}, Llama3Scaling(8.0, 512, low=2.0)),
        ({"rope_type": "yarn", **YARN}, YarnScaling(4.0, 512)),
        ({"rope_type": "yarn", **YARN, "truncate": False}, YarnScaling(4.0, 512, truncate=False)),
        ({"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2}, YarnScaling(4.0, 512, fast=16, slow=2)),
        ({"rope_type": "yarn", **YARN, "attention_factor": 1.25}, YarnScaling(4.0, 512, amplitude=1.25)),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_scaled_frequencies_are_those_of_transformers(parameters, scaling, head_dim, base):
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=2048,
        rope_parameters={"rope_theta": base, **parameters},
    )  # fmt: skip
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    positions = torch.tensor([0, 1, 3, 700, 2047])
    angles = positions[:, None] * frequencies.double()
    cosines, sines = Rotary(base, scaling=scaling).tables(positions, head_dim, torch.float64)
    # transformers rounds frequencies to fp32: an angle of 2000 is off by up to 1e-4.
    torch.testing.assert_close(cosines, angles.cos() * amplitude, rtol=0, atol=5e-4)
    torch.testing.assert_close(sines, angles.sin() * amplitude, rtol=0, atol=5e-4)


def test_attention_is_rotated_by_scaled_tables():
    """Gradients too: with an amplitude the rotation is not orthogonal."""
    rope, layout = Rotary(10_000.0, scaling=YarnScaling(4.0, 8)), PackedLayout.documents([9])
    given = [torch.randn(9, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: rope_attention(*x, layout, rope=rope), given)
    float32 = [x.detach().float().requires_grad_() for x in given]
    expected = torch.autograd.grad(rope_attention(*given, layout, rope=rope).square().sum(), given)
    got = torch.autograd.grad(rope_attention(*float32, layout, rope=rope, backend="cpu").square().sum(), float32)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-4, atol=1e-5)
