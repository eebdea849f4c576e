"""Records that a run refuses or leaves out, and what it says of them."""

import re

import pytest
import torch
from helpers.stages import figures, go, records, settings, weights
from helpers.texts import conversation, small_tokenizer

from dph.chat import Encoded
from dph.data.formats import Encoder
from dph.data.packing import packed_length
from dph.errors import UserError

pytestmark = pytest.mark.usefixtures("every_kernel")


def test_encoded_records_and_cut_off_answers(tmp_path):
    encode = Encoder(small_tokenizer())
    pairs = [encode(record) for record in records("align")]
    result = go(settings("align", tmp_path / "encoded"), pairs, held_out=pairs[:5])
    plain = go(settings("align", tmp_path / "plain"))
    assert all(
        torch.equal(a, b) for a, b in zip(*map(lambda r: weights(r.model).values(), (result, plain)), strict=True)
    )
    chosen, rejected = pairs[0]
    cut = Encoded(rejected.tokens[:-2], rejected.targets[:-2], rejected.loss_mask[:-2], rejected.score_mask[:-2], None)
    with pytest.raises(UserError, match=r"expected finished answers, got one that was cut off: which begins '</s>"):
        go(settings("align", tmp_path / "cut"), [(chosen, cut)], held_out=[])


def test_refused_pairs_are_counted(tmp_path):
    data = records("align")
    recipe = settings("align", tmp_path / "run", evaluation__every=0, output__save_every=0)
    go(recipe, [*data[:4], type(data[0])(data[0].chosen, data[0].chosen)], held_out={})
    assert figures(tmp_path / "run")[-1]["refused"] == 32 // 4


def test_records_that_are_left_out_are_told_once_and_at_the_end(tmp_path, capsys):
    data, long = records("align", 4), conversation("hello", "world " * 300)
    same_sides = type(data[0])(data[0].chosen, data[0].chosen)
    data += [*(type(data[0])(side.chosen, long) for side in data[:3]), same_sides]
    go(settings("align", tmp_path / "run"), data, held_out={"dev": data}, quiet=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    reason = r"longer than 200 tokens \(data\.context\), [0-9]+ identical"
    first, held_out, last = said
    found = re.fullmatch(rf"align: ([0-9]+) of ([0-9]+) records were left out: [0-9]+ {reason}", first)
    refused, seen = map(int, found.groups())
    assert (refused, seen - refused) == (figures(tmp_path / "run")[0]["refused"], 8)
    assert re.fullmatch(rf"align: 4 of 8 records of dev were left out: 3 {reason}", held_out)
    found = re.fullmatch(rf"align: in all, ([0-9]+) of ([0-9]+) records were left out: [0-9]+ {reason}", last)
    refused, seen = map(int, found.groups())
    assert (refused, seen - refused) == (figures(tmp_path / "run")[-2]["refused"], 32)
    go(settings("align", tmp_path / "whole"), quiet=False)
    assert "left out" not in capsys.readouterr().err


def test_pairs_above_the_budget_are_told_with_its_key(tmp_path, capsys):
    pairs = records("align")
    room = max(packed_length(Encoder(small_tokenizer())(pair)) for pair in pairs) - 1
    go(settings("align", tmp_path / "run", batch__tokens=room), pairs, held_out=[], quiet=False)
    assert f"more than {room} tokens together (batch.tokens)\n" in capsys.readouterr().err
