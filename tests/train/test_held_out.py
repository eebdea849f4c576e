"""Held-out text: each document alone, whatever the batch."""

import pytest
import torch
from helpers.stages import go, records, settings, tiny
from helpers.texts import small_tokenizer

from dph.data.formats import Encoder, Text

CUT = [Text("The quick brown fox jumps over the lazy dog. " * 3, continues=True), Text("It is late.")]


def by_hand(model, items):
    """Mean loss over the targets of documents of one record each."""
    encode, losses = Encoder(small_tokenizer()), []
    with torch.no_grad():
        for record in items:
            encoded = encode(record)
            logits = model(torch.tensor([encoded.tokens])).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.targets), reduction="none"))
            losses[-1] = losses[-1][torch.tensor(encoded.loss_mask)]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(("size", "micro"), [(1, None), (2, 1), (5, None)])
def test_the_loss_of_documents_is_that_of_each_alone(tmp_path, stage, size, micro):
    """Documents longer than the context continue with memory, here of all their tokens."""
    items = records(stage, 7)
    changes = {"batch__size": size, "batch__micro": micro, "data__memory": 100, "evaluation__every": 1}
    still = {"optimiser__steps": 1, "optimiser__warmup": 0, "optimiser__lr": 0.0, "optimiser__final_lr": 0.0}
    model = tiny()
    found = go(settings(stage, tmp_path / "run", **changes, **still), model=model, held_out=items).evaluation
    assert found["loss"] == pytest.approx(by_hand(model.eval(), items), abs=1e-5)


def test_the_pieces_of_a_long_text_are_one_document(tmp_path):
    """Memory carries the first piece to the second, so that the loss of both is not that of each alone."""
    still = {"optimiser__steps": 1, "optimiser__warmup": 0, "optimiser__lr": 0.0, "optimiser__final_lr": 0.0}
    recipe = settings("pretrain", tmp_path / "run", data__memory=200, data__context=16, **still)
    pieces = [go(recipe, model=tiny(), held_out=CUT).evaluation["loss"]]
    encode = Encoder(small_tokenizer())
    first, second = map(encode, CUT)
    joined = type(first)(
        first.tokens + second.tokens, first.targets + second.targets, first.loss_mask + second.loss_mask,
        first.score_mask + second.score_mask, None,
    )  # fmt: skip
    whole = settings("pretrain", tmp_path / "whole", data__context=200, **still)
    pieces.append(go(whole, model=tiny(), held_out=[joined]).evaluation["loss"])
    assert pieces[0] == pytest.approx(pieces[1], abs=1e-5)
