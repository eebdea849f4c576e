"""Answers that are cut and closed with their final labels (``data.prefixes``)."""

import pytest
from helpers.stages import Killed, Trap, die, figures, go, records, same, settings, weights
from helpers.texts import conversation, small_tokenizer

from dph import chat
from dph.data.formats import Encoder, Labelled, Preference
from dph.data.labels import Label, labels_of
from dph.data.packing import PairBatches
from dph.data.prefixes import Prefixes, cut_after
from dph.data.sampler import Shuffled
from dph.errors import UserError
from dph.train import checkpointing, recipe

TOK = small_tokenizer()
QUESTION = [{"role": "user", "content": "quick?"}]


@pytest.mark.parametrize("kept", [1, 2, 5, 100])
def test_a_cut_answer_is_its_beginning_with_the_end_of_turn(kept):
    whole = chat.encode(conversation("quick?", "the late fox 12 jumps"), TOK, last_only=True)
    content = [token for token, scored in zip(whole.targets, whole.score_mask, strict=True) if scored]
    assert len(content) > 5
    end = chat.markup(TOK).end_of_turn
    assert cut_after(whole, kept) == chat.continuation(chat.prompt(QUESTION, TOK), [*content[:kept], end], TOK)


def test_all_answers_of_a_record_are_cut_after_the_same_number_of_tokens_and_keep_their_labels():
    answers = [conversation("quick?", text) for text in ("the late brown fox", "the", "12 lazy dogs and a fox")]
    labels = (Label(0, None), Label(None, 1, "safe"), Label(None, 2))
    encoded = Encoder(TOK)(Labelled(answers, labels))
    lengths = [sum(answer.score_mask) for answer in encoded]
    seen = set()
    for seed in range(50):
        cut = Prefixes(0.999, seed)(encoded)
        own = [sum(answer.score_mask) for answer in cut]
        kept = max(own)
        assert own == [min(length, kept) for length in lengths]
        assert kept < max(lengths)
        assert labels_of(cut) == labels
        assert Prefixes(0.999, seed)(encoded) == cut
        seen.add(kept)
    assert seen == set(range(1, max(lengths)))


def test_a_share_of_the_records_has_beginnings_which_follow_them_in_the_batch():
    pairs = [
        Preference(conversation(f"late {i}", f"good fox {i}"), conversation(f"late {i}", f"bad {i}"))
        for i in range(400)
    ]
    encode, cut = Encoder(TOK), Prefixes(0.25, 3)
    batches = PairBatches(Shuffled(pairs, 0), encode, 40, cut=cut)
    plain = [encode(pair) for pair in pairs]
    total = 0
    for _ in range(10):
        batch = next(batches)
        assert len(batch) == 40
        for before, pair in zip([None, *batch], batch, strict=False):
            if pair not in plain:
                assert pair == cut(before)
                total += 1
    assert total == 400 - batches.records.position
    assert 0.15 < total / batches.records.position < 0.35


def test_beginnings_that_are_alike_and_answers_of_one_token_are_no_records():
    encode, cut = Encoder(TOK), Prefixes(0.999, 0)
    assert cut(encode(Preference(conversation("quick?", "1"), conversation("quick?", "2")))) is None
    alike = Preference(conversation("quick?", "fox fox fox 1"), conversation("quick?", "fox fox fox 2"))
    batches = PairBatches(Shuffled([alike], 0), encode, 8, cut=cut)
    for pair in next(batches):
        assert pair[0].tokens != pair[1].tokens


@pytest.mark.parametrize("stage", ["head", "align"])
def test_a_killed_run_with_prefixes_resumes_bit_for_bit(stage, tmp_path):
    changes = {"data__prefixes": 0.5} | ({"objective__dpo_weight": 0.0} if stage == "align" else {})
    whole = go(settings(stage, tmp_path / "whole", **changes))
    with pytest.raises(Killed):
        go(settings(stage, tmp_path / "run", **changes), Trap(records(stage), 17, die))
    assert 0 < checkpointing.newest_checkpoint(tmp_path / "run/checkpoints").step < 8
    same(whole, go(settings(stage, tmp_path / "run", **changes), resume=True))
    assert figures(tmp_path / "whole") == figures(tmp_path / "run")
    without = go(settings(stage, tmp_path / "without", **(changes | {"data__prefixes": 0.0})))
    assert any(not weight.equal(weights(without.model)[name]) for name, weight in weights(whole.model).items())


@pytest.mark.parametrize(("stage", "reason"), [("sft", "without a head"), ("align", "with objective.dpo_weight 1")])
def test_text_is_not_learnt_from_cut_answers(stage, reason):
    with pytest.raises(UserError, match=f"data.prefixes: expected 0 in stage {stage} {reason}, got 0.25"):
        recipe.from_dict({"stage": stage, "data": {"prefixes": 0.25}})
