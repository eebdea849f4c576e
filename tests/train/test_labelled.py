"""Labels on answers: alone, by head, several rejected ones and scores, through both preference stages."""

import json
import math

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, go, records, same, settings, tiny, weights
from helpers.texts import small_tokenizer, write_lines

from dph.data import dataset
from dph.data.formats import Encoder, Preference, parse_record
from dph.data.labels import Label, Labelled
from dph.data.packing import pack
from dph.errors import UserError
from dph.train import recipe as recipes
from dph.train.build import make_stage
from dph.train.head_states import prepare_heads
from dph.train.stages.held_out import compared_sides

GOOD, BAD = Label(0, None), Label(None, 0)


def alone(pairs):
    """The answers of pairs, each labelled by itself."""
    found = []
    for pair in pairs:
        found += [Labelled([pair.chosen], (GOOD,)), Labelled([pair.rejected], (BAD,))]
    return found


def gradients(stage_name, data, size, directory, model=None, **changes):
    """Mean loss and gradients of the first step."""
    changes = {"objective__dpo_weight": 0.0, "batch__size": size, "data__cache_states": False} | changes
    recipe = settings(stage_name, directory, **changes)
    stage = make_stage(recipe, model or tiny(reward_dropout=0.0), small_tokenizer(), data, {})
    stage.reference = stage.model
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    batch, total, sums = stage.next_batch(), 0.0, 0.0
    for micro_batch in batch.micro_batches:
        loss = stage.loss(stage.prepare(micro_batch, 1))
        (loss.total / batch.weight).backward()
        total, sums = total + float(loss.total.detach()) / batch.weight, sums + loss.sums / batch.weight
    grads = {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}
    return total, grads, dict(zip(stage.metrics, sums.tolist(), strict=True))


def equal(one, two, scale=1.0):
    assert one[0] == pytest.approx(scale * two[0], abs=1e-6)
    assert one[1].keys() == two[1].keys()
    for name, grad in one[1].items():
        assert torch.allclose(grad, scale * two[1][name], atol=1e-6), name


@pytest.mark.parametrize("stage", ["align", "head"])
@pytest.mark.parametrize("micro", [None, 2])
def test_answers_labelled_alone_equal_their_pairs(stage, micro, tmp_path):
    """Loss and gradients of the separable objective, over all records in one batch, whatever the micro-batch."""
    pairs = records(stage, 6)
    one = gradients(stage, pairs, 6, tmp_path, batch__micro=micro)
    two = gradients(stage, alone(pairs), 12, tmp_path, batch__micro=micro)
    equal(two, one)
    for name in ("loss", "dph_loss", "reward_chosen", "reward_rejected"):
        assert two[2][name] == pytest.approx(one[2][name], abs=1e-6)
    assert two[2]["reward_margin"] == pytest.approx(one[2]["reward_margin"] / 2, abs=1e-6)  # other answer: reward 0


@pytest.mark.parametrize("micro", [None, 2])
def test_pairs_given_as_labels_are_pairs(tmp_path, micro):
    """Through the form of any labels, cDPO and both objectives have the loss and gradients of plain pairs."""
    pairs = records("align", 6)
    labelled = [Labelled([pair.rejected, pair.chosen], (Label(1, 0),)) for pair in pairs]
    for objective in ("separable", "contrastive"):
        changes = {"objective__objective": objective, "objective__dpo_weight": 1.0, "batch__micro": micro}
        one = gradients("align", pairs, 6, tmp_path, **changes)
        two = gradients("align", labelled, 6, tmp_path, **changes)
        equal(two, one)
        assert two[2] == pytest.approx(one[2], abs=1e-5)


def test_two_heads_with_labels_of_their_own_equal_two_runs_with_one(tmp_path):
    """The loss of several heads is their mean; each has the gradient of its own run."""
    pairs = records("head", 6)
    own = {"helpful": pairs, "safe": [Preference(pair.rejected, pair.chosen) for pair in pairs[:3]]}
    both = [dataset.for_head(pair, name, "") for name, pairs in own.items() for pair in pairs]
    names = list(own)
    model = lambda: tiny(reward_dropout=0.0, reward_heads=[], task_heads=names)  # noqa: E731
    joint = gradients("head", both, 9, tmp_path, model(), objective__heads=names)
    alone_losses = []
    for name in names:
        one = gradients("head", own[name], len(own[name]), tmp_path, model(), objective__heads=[name])
        alone_losses.append(one[0])
        for parameter, grad in one[1].items():
            assert torch.allclose(2 * joint[1][parameter], grad, atol=1e-6), parameter
        for metric in ("dph_loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"):
            assert joint[2][f"{metric}_{name}"] == pytest.approx(one[2][metric], abs=1e-6)
    assert joint[0] == pytest.approx(sum(alone_losses) / 2, abs=1e-6)
    rows = [Labelled([pair.chosen], (Label(0, None, "helpful"), Label(None, 0, "safe"))) for pair in pairs]
    labelled = gradients("head", rows, 6, tmp_path, model(), objective__heads=names)
    for name, label in (("helpful", GOOD), ("safe", BAD)):
        single = [Labelled([pair.chosen], (label,)) for pair in pairs]
        one = gradients("head", single, 6, tmp_path, model(), objective__heads=[name])
        for parameter, grad in one[1].items():
            assert torch.allclose(2 * labelled[1][parameter], grad, atol=1e-6), parameter


def test_a_run_on_labels_is_the_same_with_workers_and_after_an_interruption(tmp_path):
    """Bit for bit, in a mixture of plain pairs and labels, with several heads and caches."""
    pairs = records("head", 12)
    lists = Labelled([pairs[0].chosen, pairs[1].rejected, pairs[2].rejected], (Label(0, 1, "a"), Label(0, 2, "a")))
    data = [*pairs, *alone(pairs[:3]), lists]
    model = lambda: tiny(reward_heads=["a", "b"])  # noqa: E731
    changes = {"objective__heads": ["a", "b"], "batch__size": 3, "evaluation__every": 0}
    whole = go(settings("head", tmp_path / "whole", **changes), data, model())
    assert len(list((tmp_path / "whole/cache").iterdir())) == 2  # of steps of plain pairs, and of others
    same(whole, go(settings("head", tmp_path / "workers", data__workers=2, **changes), data, model()))
    recipe = settings("head", tmp_path / "parts", **changes)
    with pytest.raises(Killed):
        go(recipe, Trap(data, 16, die), model())
    same(whole, go(recipe, data, model(), resume=True))


def test_several_rejected_answers_are_the_mean_of_their_pairs(tmp_path):
    pairs = records("align", 4)
    lists = [Labelled([p.chosen, p.rejected, q.rejected], (Label(0, 1, None, 0.5), Label(0, 2, None, 0.5)))
             for p, q in zip(pairs, pairs[1:] + pairs[:1], strict=True)]  # fmt: skip
    singles = [Preference(r.answers[0], answer) for r in lists for answer in r.answers[1:]]
    for changes in ({}, {"objective__objective": "contrastive", "objective__dpo_weight": 1.0}):
        equal(gradients("align", lists, 4, tmp_path, **changes), gradients("align", singles, 8, tmp_path, **changes))


def test_a_margin_offsets_the_contrastive_objective(tmp_path):
    pair = records("head", 1)[0]
    losses = []
    for margin in (0.0, 1.5):
        data = [Labelled([pair.chosen, pair.rejected], (Label(0, 1, None, 1.0, margin),))]
        loss, _, metrics = gradients("head", data, 1, tmp_path, objective__objective="contrastive")
        x = torch.tensor(metrics["reward_margin"] - margin)
        expected = -0.9 * torch.nn.functional.logsigmoid(x) - 0.1 * torch.nn.functional.logsigmoid(-x)
        assert loss == pytest.approx(float(expected), abs=1e-6)
        losses.append(loss)
    assert losses[1] != losses[0]


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("head", {"objective__objective": "contrastive"}, r"objective\.objective: expected separable, got contrastive"),
        ("align", {"objective__dpo_weight": 1.0}, r"objective\.dpo_weight: expected 0, as cDPO compares two"),
    ],
)
def test_objectives_that_compare_refuse_answers_labelled_alone(stage, changes, message, tmp_path):
    with pytest.raises(UserError, match=message + ".* one labelled alone, which begins '"):
        gradients(stage, alone(records(stage, 4)), 4, tmp_path, **changes)


@pytest.mark.parametrize("cached", [True, False])
def test_a_head_learns_from_answers_labelled_alone(cached, tmp_path):
    """With and without the cache of states, with dropout and an ensemble."""
    changes = {"optimiser__prior_decay": 0.0, "data__cache_states": cached, "optimiser__steps": 60}
    held_out = {"alone": alone(records("head", 5)), "pairs": records("head", 5)}
    model = lambda: tiny(reward_members=2)  # noqa: E731
    recipe = settings("head", tmp_path / "run", **changes)
    result = go(recipe, alone(records("head")), model(), held_out=held_out)
    assert result.evaluation["reward_accuracy/pairs"] == 1.0
    assert result.evaluation["reward_accuracy/alone"] > 0.6
    assert math.isnan(result.evaluation["logprob_accuracy/alone"])
    assert result.evaluation["logprob_accuracy"] == result.evaluation["logprob_accuracy/pairs"]
    if cached:
        other = settings("head", tmp_path / "other", **{**changes, "data__cache_states": False})
        again = go(other, alone(records("head")), model(), held_out=held_out)
        assert figures(tmp_path / "run")[-1] == pytest.approx(figures(tmp_path / "other")[-1], rel=1e-3, abs=1e-4)
        for name, weight in weights(again.model).items():
            assert torch.allclose(weight, weights(result.model)[name], atol=1e-3), name


def test_answers_labelled_alone_choose_the_layer_and_its_scale(tmp_path):
    """Linear probes compare each answer with the mean of all; the standardisation is that of all answers."""
    changes = {"objective__layer": "auto", "objective__standardised": True, "optimiser__steps": 2}
    models = []
    for name, data in (("alone", alone(records("head", 20))), ("pairs", records("head", 20))):
        model = tiny(reward_standardised=True, num_hidden_layers=1)  # below it all answers have the same state
        model.untrained_heads = {"default"}
        recipe = settings("head", tmp_path / name, batch__size=2, **changes)
        models.append(go(recipe, data, model, held_out={}).model)
    assert models[0].config.reward_layer == models[1].config.reward_layer
    figures = [model.heads["shared"].standardise for model in models]
    assert torch.allclose(figures[0].mean, figures[1].mean, atol=1e-5)


ROWS = [
    ({"prompt": "a", "completion": "b", "label": True}, 1, [GOOD]),
    ({"prompt": "a", "completion": "b", "label": 0}, 1, [BAD]),
    (
        {"prompt": "a", "completion": "b", "labels": {"x": 1, "y": False, "z": None}},
        1,
        [Label(0, None, "x"), Label(None, 0, "y")],
    ),
    ({"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}, 3, [Label(0, 1, None, 0.5), Label(0, 2, None, 0.5)]),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, 2, [Label(0, 1, None, 1.0, 2.0)]),
    (
        {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 3, 1]},
        3,
        [Label(1, 0, None, 0.5, 2.0), Label(1, 2, None, 0.5, 2.0)],
    ),
    (
        {"prompt": "a", "completions": ["b", "c"], "scores": {"x": [1, 3], "y": [2, 2], "z": None}},
        2,
        [Label(1, 0, "x", 1.0, 2.0)],
    ),
    ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, 2, []),
]


@pytest.mark.parametrize(("row", "answers", "labels"), ROWS)
def test_rows_with_labels(row, answers, labels, tmp_path):
    (record,) = dataset.load(write_lines(tmp_path / "a.jsonl", row), "labelled preference")
    assert record.labels == tuple(labels)
    texts = [messages[-1]["content"] for messages in record.answers]
    assert texts == ["b", "c", "d"][:answers]
    assert all(messages[0] == {"role": "user", "content": "a"} for messages in record.answers)
    encoded = Encoder(small_tokenizer())(record)
    assert (len(encoded), encoded.labels) == (answers, record.labels)


ASK, YES, NO = ({"role": role, "content": text} for role, text in
                (("user", "a"), ("assistant", "b"), ("assistant", "c")))  # fmt: skip
HH = "\n\nHuman: a\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "options", "labels"),
    [
        ({"instruction": "a", "input": "", "output": "b", "label": "True"}, {}, [GOOD]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "label": "0"}, {}, [BAD]),
        ({"messages": json.dumps([ASK, YES]), "labels": '{"x": 0}', "margin": ""}, {}, [Label(None, 0, "x")]),
        ({"messages": [ASK, {**YES, "weight": 1}], "labels": {"x": 0}}, {}, [Label(None, 0, "x")]),
        ({"ask": "a", "good": True, "completion": "b"}, {"columns": {"prompt": "ask", "label": "good"}}, [GOOD]),
        ({"prompt": HH, "completion": "b", "label": 1}, {"rendered": True}, [GOOD]),
        ({"completion": HH + "b", "label": 1}, {"rendered": True}, [GOOD]),
        (
            {"chosen": HH + "b", "rejected": [HH + "c", HH + "b"]},
            {"rendered": True},
            [Label(0, 1, None, 0.5), Label(0, 2, None, 0.5)],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "completions": [[YES], json.dumps([NO])],
             "scores": "[2, 1]"},
            {},
            [Label(0, 1, None, 1.0, 1.0)],
        ),
        ({"prompt": [ASK], "chosen": YES, "rejected": [[NO]], "margin": "2"}, {}, [Label(0, 1, None, 1.0, 2.0)]),
        ({"prompt": "a", "completions": '["b", "c"]', "scores": "[1, 2]"}, {}, [Label(1, 0, None, 1.0, 1.0)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rows_of_every_form_with_labels(row, options, labels, system):
    """Fields of labels and of the system are used, and so not reported as ignored."""
    if system is not None and options.get("rendered") and "prompt" not in row:
        system = None  # the system message of a rendered conversation is its own
    ignored = set()
    row = {**row, "system": system, "id": 3}
    record = parse_record(row, "labelled preference", ignored=ignored, **options)
    assert record.labels == tuple(labels)
    before = [ASK] if system is None else [{"role": "system", "content": system}, ASK]
    for messages, answer in zip(record.answers, [YES, NO, YES][: len(record.answers)], strict=True):
        assert messages == [*before, answer]
    assert ignored - {"margin"} == {"id"}


def test_labels_in_a_table_of_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion,label,labels\na,b,true,\na,b,0,\na,b,,"{""x"": 1}"\n')
    assert [record.labels[0] for record in dataset.load(path, "labelled preference")] == [
        GOOD,
        BAD,
        Label(0, None, "x"),
    ]


def test_a_pair_is_no_label_without_margin_and_reports_what_it_ignores():
    ignored = set()
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0, "label": 1}
    assert parse_record(row, "labelled preference", ignored=ignored) == Preference([ASK, YES], [ASK, NO])
    assert ignored == {"label"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": [{**YES, "weight": 0}], "label": 1},
        {"messages": [ASK, {**YES, "train": False}], "label": 1},
        {"prompt": "a", "chosen": [YES], "rejected": [[NO], [{**NO, "weight": 0}]]},
        {"prompt": "a", "completions": [[YES], [{**NO, "loss": 0}]], "scores": [1, 2]},
    ],
)
def test_an_answer_that_is_not_to_be_learnt_has_no_label(row):
    with pytest.raises(UserError, match="record: expected answers to learn from, got one with weight 0"):
        parse_record(row, "labelled preference")


def test_held_out_labels_count_by_weight_and_ties_half(tmp_path):
    """Of the heads' own labels; an answer without a value is not compared."""
    encode = Encoder(small_tokenizer())
    own = encode(Labelled([[ASK, YES], [ASK, NO], [ASK, YES]], (Label(0, 1, "x", 0.5), Label(2, 1, "y"), GOOD)))
    empty = encode(Labelled([[ASK, YES], [ASK, {**NO, "content": ""}]], (Label(0, 1), BAD)))
    pair = encode(Preference([ASK, YES], [ASK, NO]))
    values = [1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0]
    answers = [own, empty, pair]
    expected = ([[1.0, 2.0], [1.0, 0.0], [-4.0, 5.0], [0.0, -4.0], [6.0, 7.0]], [0.5, 1.0, 1.0, 1.0, 1.0])
    assert compared_sides(answers, values, "x") == expected
    assert compared_sides(answers, values, None) == ([[1.0, 2.0], [3.0, 2.0], [6.0, 7.0]], [0.5, 1.0, 1.0])
    model = tiny()
    with torch.no_grad():
        model.heads["shared"].reward["default"].weight.zero_()
    recipe = settings("head", tmp_path / "ties", optimiser__lr=0.0, optimiser__final_lr=0.0)
    assert go(recipe, model=model, held_out={"a": alone(records("head", 3))}).evaluation["reward_accuracy"] == 0.5
    with torch.no_grad():
        model.heads["shared"].reward["default"].weight.fill_(math.nan)
    recipe = settings("head", tmp_path / "nan", guard__stop_after=99)
    with pytest.raises(RuntimeError, match=r"a: reward_accuracy: expected finite numbers, got \[nan, 0.0\]"):
        go(recipe, model=model, held_out={"a": alone(records("head", 3))})


def test_a_sample_of_labelled_answers_is_computed_once(tmp_path):
    """Its states of the chosen layers are stored for training, a row for each answer."""
    model = tiny(reward_standardised=True)
    model.untrained_heads = {"default"}
    changes = {"objective__layer": "auto", "objective__standardised": True, "objective__sample": 20}
    recipe = settings("head", tmp_path / "run", **changes)
    stage = make_stage(recipe, model, small_tokenizer(), alone(records("head", 20)), {})
    prepare_heads(stage, quiet=True)
    assert stage.frozen.caches == [stage.frozen.answer_cache]
    assert stage.frozen.answer_cache.computed == len(stage.frozen.answer_cache.store) > 0
    sample = stage.first_pairs(20)[:20]
    found = stage.frozen.answer_cache.rows(sample, lambda: pytest.fail("computed again"))
    torch.testing.assert_close(found, model.reward_states(pack(sample)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "b", "label": 2}, "label: expected true, false, 0 or 1, got 2"),
        ({"completion": "b", "label": 1.0}, "label: expected true, false, 0 or 1, got 1.0"),
        ({"completion": "b", "label": 1, "labels": {"x": 1}}, "expected either label or labels, got both"),
        ({"completion": "b", "labels": {"x": "good"}}, "labels.x: expected true, false, 0 or 1, got 'good'"),
        ({"completion": "b", "labels": {"x": None}}, "labels: expected true, false, 0 or 1 by the name of a head, got"),
        ({"completion": "b", "labels": [1]}, "labels: expected true, false, 0 or 1 by the name of a head, got [1]"),
        ({"completions": ["b"], "scores": [1]}, "completions: expected a list of at least two answers, got ['b']"),
        ({"completions": ["b", "c"], "scores": [1]}, "scores: expected 2 numbers, one for each completion, got [1]"),
        ({"completions": ["b", "c"], "scores": [1, "2"]}, "scores.1: expected a finite number, got '2'"),
        ({"chosen": "b", "rejected": "c", "margin": "big"}, "margin: expected a finite number, got 'big'"),
        ({"chosen": "b", "rejected": ["c", 5]}, "rejected: expected"),
        ({"completion": "b"}, "expected a labelled preference: prompt, chosen and rejected"),
    ],
)
def test_malformed_labels_are_named(row, message, tmp_path):
    with pytest.raises(UserError) as caught:
        dataset.load(write_lines(tmp_path / "a.jsonl", {"prompt": "a", **row}), "labelled preference")
    assert f"a.jsonl:1: {message}" in str(caught.value)


def test_sources_with_heads_train_several_heads_from_files(tmp_path):
    """Each source labels for its own head; records without a label for a trained one are left out and counted."""
    helpful = [{"prompt": f"hello {i}", "chosen": "yes it is", "rejected": "no"} for i in range(8)]
    safe = [{"prompt": f"late {i}", "completion": "no" if i % 2 else "yes", "label": i % 2} for i in range(8)]
    write_lines(tmp_path / "helpful.jsonl", *helpful)
    write_lines(tmp_path / "safe.jsonl", *safe, {"prompt": "x", "completion": "y", "labels": {"other": 1}})
    sources = [{"source": str(tmp_path / "helpful.jsonl"), "head": "helpful"}, {"source": str(tmp_path / "safe.jsonl")}]
    values = settings("head", tmp_path / "run", objective__heads=["helpful", "safe"], output__log_every=1).as_dict()
    values["data"]["sources"] = sources
    values["evaluation"] |= {"sources": [{**sources[0]}], "every": 4}
    from dph.train.entry import train

    model = tiny(reward_heads=["helpful", "safe"])
    result = train(
        recipes.from_dict(json.loads(json.dumps(values))), model=model, tokenizer=small_tokenizer(), quiet=True
    )
    assert "reward_accuracy_helpful" in result.evaluation
    assert math.isnan(result.evaluation["reward_accuracy_safe"])
    assert {"helpful", "safe"} <= {path.name for path in (tmp_path / "run/heads").iterdir()}
    sources[0]["head"] = "helpfull"
    with pytest.raises(UserError, match=r"data\.sources\.0\.head: expected one of helpful, safe, got 'helpfull'"):
        recipes.from_dict(json.loads(json.dumps(values)))
