"""Rows of other programs, rendered conversations, and what must not be dropped or guessed."""

import copy
import json

import pytest
from helpers.texts import conversation, message, small_tokenizer

from dph import chat
from dph.data.formats import Conversation, Encoder, Preference, Text, parse_record
from dph.errors import UserError

SYSTEM = message("system", "Be brief.")
FIRST, SECOND = conversation("hello?", "hi"), conversation("how?", "so")
ASK, YES, NO = message("user", "why?"), message("assistant", "yes"), message("assistant", "no")
PAIR = Preference([ASK, YES], [ASK, NO])
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def parts(text):
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:], "image_url": None}]


def sharegpt(*messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "Be brief.", "messages": FIRST},
        {"system": "Be brief.", "messages": [SYSTEM, *FIRST]},
        {"system": None, "messages": [SYSTEM, *FIRST]},
        {"system": "", "messages": [SYSTEM, *FIRST], "tools": None},
        {"system": "Be brief.", "prompt": "hello?", "completion": "hi"},
        {"system": "Be brief.", "prompt": FIRST[:1], "completion": FIRST[1:]},
        {"system": "Be brief.", "prompt": "hello?", "chosen": "hi", "rejected": "no"},
        {"system": "Be brief.", "chosen": FIRST, "rejected": [FIRST[0], NO]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *FIRST]},
        {"messages": [{**turn, "content": parts(turn["content"])} for turn in (SYSTEM, *FIRST)]},
        {"messages": [{**turn, "tool_calls": None, "images": []} for turn in (SYSTEM, *FIRST)], "tools": "[]"},
        {"messages": [{**turn, "weight": int(turn["role"] == "assistant")} for turn in (SYSTEM, *FIRST)]},
        {"messages": json.dumps([SYSTEM, *FIRST])},
        {"conversations": sharegpt(SYSTEM, *FIRST)},
        {"conversations": sharegpt(*FIRST), "system": "Be brief."},
        {"conversation": json.dumps(sharegpt(SYSTEM, *FIRST))},
        {"instruction": "hello?", "input": "", "output": "hi", "system": "Be brief."},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_a_conversation_of_every_form_is_the_same(fields):
    assert parse_record(fields, "conversation") == Conversation([SYSTEM, *FIRST])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "why?", "chosen": {**YES, "weight": 1}, "rejected": NO},
        {"prompt": sharegpt(ASK), "chosen": sharegpt(YES)[0], "rejected": sharegpt(NO)[0]},
        {"conversations": sharegpt(ASK), "chosen": sharegpt(YES)[0], "rejected": sharegpt(NO)[0]},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
        {"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])},
        {"instruction": "why?", "input": None, "chosen": "yes", "rejected": "no"},
        {"input": {"messages": [ASK]}, "preferred_output": [YES], "non_preferred_output": [NO]},
        {"chosen": "\n\nHuman: why?\n\nAssistant: yes", "rejected": "\n\nHuman: why?\n\nAssistant: no"},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_a_pair_of_every_form_is_the_same(fields):
    assert parse_record(fields, "preference") == PAIR


def test_an_instruction_is_followed_by_its_input():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert parse_record(row, "conversation") == Conversation(conversation("Add.\n\n1 and 2", "3"))


@pytest.mark.parametrize(
    ("prompt", "side", "whole"),
    [
        ([*FIRST, SECOND[0]], SECOND, [*FIRST, *SECOND]),
        ([*FIRST, SECOND[0]], [SECOND[1]], [*FIRST, *SECOND]),
        ([*FIRST, SECOND[0]], [*FIRST, *SECOND], [*FIRST, *SECOND]),
        (FIRST, SECOND, [*FIRST, *SECOND]),
        (FIRST, [FIRST[1], *SECOND], [*FIRST, *SECOND]),
        ("how?", [*FIRST, *SECOND], [*FIRST, *SECOND]),
        ("hello?", [*FIRST, *SECOND], [*FIRST, *SECOND]),
        (" how? ", SECOND, SECOND),
        ([SYSTEM, FIRST[0]], FIRST, [SYSTEM, *FIRST]),
        ([SYSTEM, *FIRST, SECOND[0]], [SYSTEM, *FIRST, *SECOND], [SYSTEM, *FIRST, *SECOND]),
        ([FIRST[0]], [SYSTEM, *FIRST], [SYSTEM, *FIRST]),
        ([*FIRST, FIRST[0]], [*FIRST[:1], YES], [*FIRST, FIRST[0], YES]),
    ],
)
def test_a_side_joins_the_part_of_the_prompt_that_it_repeats_once(prompt, side, whole):
    got = parse_record({"prompt": prompt, "chosen": side, "rejected": [*side[:-1], NO]}, "preference")
    assert got == Preference(whole, [*whole[:-1], NO])
    assert parse_record({"prompt": prompt, "completion": side}, "conversation") == Conversation(whole)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "other?", "chosen": FIRST, "rejected": FIRST}, "x: chosen: .* begins with another user message"),
        ({"prompt": [*FIRST, ASK], "chosen": SECOND, "rejected": SECOND}, "another user message: 'how[?]'"),
        ({"system": "Be long.", "chosen": [SYSTEM, *FIRST], "rejected": FIRST}, "expected one system message, got two"),
        ({"prompt": 0, "chosen": "a", "rejected": "b"}, "x: prompt: expected text or a list of messages, got 0"),
        ({"prompt": "a", "chosen": {**YES, "weight": 0}, "rejected": NO}, "two answers to learn from, got one with"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, r"got the fields prompt, chosen \(null\), rejected"),
    ],
)
def test_a_pair_that_contradicts_itself_is_refused(row, error):
    with pytest.raises(UserError, match=error):
        parse_record(row, "preference", "x")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "a", "completion": "b", "functions": CALL}, "functions: not supported"),
        (
            {"prompt": "a", "completion": "b", "system_prompt": "c"},
            r"not supported, .*columns: {system: system_prompt}",
        ),
        ({"messages": [ASK, {**YES, "function_call": CALL}]}, r"\[1\]: function_call: not supported"),
        ({"messages": [ASK, {**YES, "reasoning_content": "hm"}]}, r"messages\[1\]: reasoning_content: not supported"),
        ({"messages": [ASK, YES, {"role": "robot", "content": "1"}, YES]}, r"\[2\]: expected role .* got 'robot'"),
        ({"messages": [ASK, {**YES, "content": None}]}, r"messages\[1\]\.content: expected text, got None"),
        ({"messages": [ASK, {**YES, "content": 3}]}, r"messages\[1\]\.content: expected text, got 3"),
        ({"messages": [ASK, {**YES, "content": [{"type": "image_url"}]}]}, r"content\[0\]: expected a part of type te"),
        ({"messages": [ASK, {**YES, "content": ["yes"]}]}, r"content\[0\]: expected a part of type text, got 'yes'"),
        ({"messages": [ASK, {**YES, "weight": 0.5}]}, r"messages\[1\]\.weight: expected 0 or 1, got 0\.5"),
        ({"messages": [ASK, {**YES, "weight": 0, "train": True}]}, r"\.train: expected what the other flags"),
        ({"messages": [{**ASK, "loss": True}, YES]}, "expected weight 0 or none for a user message"),
        ({"messages": [ASK, {**YES, "train": False}]}, "expected an answer to learn, got weight 0 for each"),
        ({"messages": FIRST, "train": False}, "train: expected rows of one weight .* got False"),
        ({"messages": FIRST, "weight": 0.2}, r"weight: expected rows of one weight .* got 0\.2"),
        ({"messages": "hello?"}, "x: messages: expected a list of messages, got 'hello[?]'"),
        ({"messages": '[{"role": "user", "content": }]'}, "messages: expected a list of messages, got a text that is"),
        ({"messages": str(FIRST)}, "messages: expected messages as a list or as JSON, got a list as Python prints it"),
        ({"instruction": 3, "output": "a"}, "x: instruction: expected text, got 3"),
        ({"instruction": "a", "output": None}, "x: expected a conversation"),
        ({"conversations": [{"from": "function_call", "value": "f"}, *sharegpt(*FIRST)]}, "got 'function_call'"),
    ],
)
def test_what_carries_meaning_and_is_not_supported_is_refused_by_name(row, error):
    with pytest.raises(UserError, match=error):
        parse_record(row, "conversation", "x")


OWN_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": 0.0}])
@pytest.mark.parametrize("template", [chat.TEMPLATE, OWN_TEMPLATE], ids=["paper", "own"])
def test_an_excluded_answer_has_no_targets(flag, template):
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = template
    record = parse_record({"messages": [FIRST[0], {**FIRST[1], **flag}, *SECOND]}, "conversation")
    encoded = Encoder(tokenizer)(record)
    alone = chat.encode([*FIRST, *SECOND], tokenizer, last_only=True)
    assert (encoded.tokens, encoded.loss_mask, encoded.score_mask) == (alone.tokens, alone.loss_mask, alone.score_mask)
    with pytest.raises(UserError, match="expected messages that are all learnt as text, got one with weight 0"):
        parse_record({"messages": [FIRST[0], {**FIRST[1], **flag}, *SECOND]}, "text")
    with pytest.raises(UserError, match=r"messages\[1\]\.train: expected true or false, got 'no'"):
        chat.encode([ASK, {**YES, "train": "no"}], tokenizer)


def test_fields_without_a_use_are_collected():
    ignored = set()
    pair = {
        "prompt": "why?",
        "chosen": [{**YES, "name": "x"}],
        "rejected": "no",
        "id": 1,
        "score": None,
        "messages": FIRST,
    }
    assert parse_record(pair, "preference", ignored=ignored) == PAIR
    parse_record({"input": {"messages": [ASK], "parallel_tool_calls": True}, "preferred_output": [YES],
                  "non_preferred_output": [NO]}, "preference", ignored=ignored)  # fmt: skip
    parse_record({"text": "a", "url": "b", "system": "c"}, "text", ignored=ignored)
    assert ignored == {"id", "messages", "messages.name", "input.parallel_tool_calls", "url", "system"}


RENDERED = {
    "ChatML": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello?<|im_end|>\n"
    "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n@@so<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhi"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhow?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n@@so<|eot_id|>",
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello? [/INST] hi </s><s>[INST] how? [/INST]@@ so </s>",
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nhello?</s>\n<|assistant|>\nhi</s>\n<|user|>\nhow?</s>\n"
    "<|assistant|>\n@@so</s>\n",
    "Gemma": "<bos><start_of_turn>user\nhello?<end_of_turn>\n<start_of_turn>model\nhi<end_of_turn>\n"
    "<start_of_turn>user\nhow?<end_of_turn>\n<start_of_turn>model\n@@so<end_of_turn>\n",
    "HH": "\n\nHuman: hello?\n\nAssistant: hi\n\nHuman: how?\n\nAssistant:@@ so",
}  # fmt: skip


@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_conversation_is_parsed_on_request_and_refused_otherwise(name):
    prompt, answer = RENDERED[name].split("@@")
    whole = [*FIRST, *SECOND] if name in ("Gemma", "HH") else [SYSTEM, *FIRST, *SECOND]
    pair = {"prompt": prompt, "chosen": answer, "rejected": answer.replace("so", "no")}
    expected = Preference(whole, [*whole[:-1], NO])
    sides = {"chosen": prompt + answer, "rejected": prompt + pair["rejected"]}
    assert parse_record(pair, "preference", rendered=True) == expected
    assert parse_record(sides, "preference", rendered=True) == expected
    assert parse_record(pair | sides, "preference", rendered=True) == expected
    assert parse_record({"prompt": prompt, "completion": answer}, "conversation", rendered=True) == Conversation(whole)
    assert parse_record({"text": prompt + answer}, "conversation", rendered=True) == Conversation(whole)
    assert parse_record({"text": prompt + answer}, "text", rendered=True) == Text(chat.text(whole))
    message = rf"expected plain text or messages, got a rendered conversation \({name}\): .* format: rendered"
    for kind, row in {
        "preference": pair,
        "conversation": {"prompt": prompt, "completion": "a"},
        "text": {"text": prompt},
    }.items():
        with pytest.raises(UserError, match=f"x: (prompt|text): {message}"):
            parse_record(row, kind, "x")
    with pytest.raises(UserError, match="x: completion: expected a rendered conversation"):
        parse_record({"prompt": "plain", "completion": "text"}, "conversation", "x", rendered=True)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("### Human: hello### Assistant: hi", "Alpaca"),
        ("Below is an instruction that ...\n\n### Instruction:\nhello\n\n### Response:\nhi", "Alpaca"),
        ("A chat between a user and an assistant. USER: hello ASSISTANT: hi</s>", "Vicuna"),
        ("<｜begin▁of▁sentence｜>hello<｜Assistant｜>hi", "control tokens"),
        ("[gMASK]<sop><|user|>\nhello<|assistant|>\nhi", "control tokens"),
        ("<|start|>user<|message|>hello<|end|>", "control tokens"),
    ],
)
def test_markup_that_is_recognised_only_is_refused(text, name):
    for kind, row in {"text": {"text": text}, "conversation": {"prompt": text, "completion": "a"}}.items():
        with pytest.raises(UserError, match=rf"x: (text|prompt): expected plain .* \({name}, which is not parsed\)"):
            parse_record(row, kind, "x")


@pytest.mark.parametrize(
    "text",
    [
        "### Instruction: a heading",
        "USER: is a word",
        "<|start|> is a token",
        "What does <|im_start|>user\n mean?",
        "<|im_start|> opens a turn.",
        "[INST] is a token of Llama 2.",
        "[1, 2] is a list",
        '[{"name": "a"}] is JSON',
        "<s> is a token",
        "Human: the species.",
        "She said:\n\nHuman: I am.\n\nAssistant: I am not.",
        "<|user|> is a role",
        " <html>",
    ],
)
def test_a_text_that_mentions_markup_is_text(text):
    assert parse_record({"text": text}, "text") == Text(text)
    record = parse_record({"prompt": text, "completion": text}, "conversation")
    assert record == Conversation(conversation(text, text))
    assert parse_record({"messages": record.messages}, "conversation") == record


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "<|im_start|>user\na<|im_end|>b<|im_start|>assistant\nc<|im_end|>",
            "turn 0 .* expected nothing between turns",
        ),
        ("<|im_start|>user\na<|im_start|>assistant\nc<|im_end|>", "turn 0 .* at its end, got none"),
        ("<|im_start|>tool\na<|im_end|>", "turn 0 .* expected role user, assistant or system, got 'tool'"),
        ("[INST] a [INST] b [/INST] c", r"turn 1 .* expected \[INST\] and \[/INST\] in turns"),
        ("plain", r"x: text: expected a rendered conversation \(ChatML, Llama 3, .*\), got 'plain'"),
        ("<|im_start|>user\na<|im_end|>", "x: expected an assistant message"),
    ],
)
def test_markup_that_is_not_whole_is_refused(text, error):
    with pytest.raises(UserError, match=error):
        parse_record({"text": text}, "conversation", "x", rendered=True)
