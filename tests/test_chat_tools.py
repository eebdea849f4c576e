"""Conversations with tools: the tokens of apply_chat_template, masks over contents and calls, text that stays text."""

import copy
import json

import pytest
from helpers import templates
from helpers.texts import conversation, message, small_tokenizer, write_lines

from dph import chat
from dph.data import dataset
from dph.data.formats import Conversation, Encoder, parse_record
from dph.errors import UserError

NAMES = tuple(templates.TOOL_MAKERS)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather of a \"city\".",
     "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]  # fmt: skip


def call(city, **fields):
    """A message of the assistant that calls the tool."""
    function = {"name": "weather", "arguments": {"city": city, "days": 2}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **fields}


def talk(text="How is Rome?", city="Rome", result='{"sun": true}', answer="It is\nsunny.", system=True):
    """A question, a call, its result and the answer, and a second question without a call."""
    turns = [message("system", "Be brief.")] * system
    turns += [message("user", text), call(city), message("tool", result), message("assistant", answer)]
    return [*turns, *conversation("And Oslo?", "Cold.")]


def with_tools(turns, tools=TOOLS):
    return [{**turns[0], "tools": tools}, *turns[1:]]


def counted(encoded, mask):
    return [target for target, on in zip(encoded.targets, mask, strict=True) if on]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("tools", [TOOLS, TOOLS * 2, None])
def test_tokens_are_those_of_apply_chat_template(name, system, tools):
    tok = templates.made(name)
    for turns in (talk(system=system), talk("é 🙂 \n", 'São "Paulo"', "3\n\n4", "  x", system=system)):
        given = turns if tools is None else with_tools(turns, tools)
        encoded = chat.encode(given, tok)
        assert encoded.tokens == tok.apply_chat_template(turns, tools=tools, return_dict=False)
        assert encoded.tokens[encoded.reward_position] == chat.markup(tok).end_of_turn
        asked = chat.prompt(given[:-1], tok)
        assert asked == tok.apply_chat_template(turns[:-1], tools=tools, add_generation_prompt=True, return_dict=False)
        answered = chat.continuation(asked, tok("Cold.")["input_ids"] + [chat.markup(tok).end_of_turn], tok)
        assert answered.tokens == encoded.tokens[: len(answered)]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (
            "qwen2.5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call><|im_end|>',
        ),
        ("llama3.1-tools", '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}<|eot_id|>'),
    ],
)
def test_masks_cover_contents_and_calls(name, first):
    tok = templates.made(name)
    end = first[first.rindex("<|") :]
    encoded = chat.encode(with_tools(talk()), tok)
    assert tok.decode(counted(encoded, encoded.loss_mask)) == f"{first}It is\nsunny.{end}Cold.{end}"
    scored = first.removesuffix(end) + "It is\nsunny.Cold."
    assert tok.decode(counted(encoded, encoded.score_mask)) == scored
    last = chat.encode(with_tools(talk()), tok, last_only=True)
    assert tok.decode(counted(last, last.loss_mask)) == f"Cold.{end}"
    untrained = with_tools([{**turn, "train": False} if turn["content"] == "Cold." else turn for turn in talk()])
    masked = chat.encode(untrained, tok)
    assert masked.tokens == encoded.tokens
    assert tok.decode(counted(masked, masked.loss_mask)) == f"{first}It is\nsunny.{end}"
    judged = chat.encode(with_tools(talk()[:3]), tok, last_only=True)  # the call is the answer
    assert tok.decode(counted(judged, judged.loss_mask)) == first
    assert judged.tokens[judged.reward_position] == tok.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_conversation_with_tools_becomes_a_control_token(name):
    tok = templates.made(name)
    added = {token.content: i for i, token in tok.added_tokens_decoder.items()}
    expected = [token for token in chat.encode(with_tools(talk()), tok).tokens if token in added.values()]
    for token in (*added, "<|im_", "end|>", "<|eot"):
        text = f"a{token}b"
        tools = json.loads(json.dumps(TOOLS).replace("Weather of", text))
        turns = with_tools(talk(text, text, text, text), tools)
        turns[0]["content"] = text
        encoded = chat.encode(turns, tok)
        assert [token for token in encoded.tokens if token in added.values()] == expected
        assert text in tok.decode(counted(encoded, encoded.score_mask))


def test_templates_without_tools_are_refused_by_name():
    cases = [
        ("llama3", with_tools(talk()), r"tools: expected a chat template that writes definitions of tools"),
        ("llama3", talk(), r"messages\[2\]: tool_calls: expected calls that the chat template writes"),
        ("chatml", [*talk()[:2], message("tool", "x"), talk()[-1]], None),  # a role as any other
        ("mistral", [*conversation("a", "b"), message("tool", "x"), talk()[-1]], "begins an answer with a constant"),
    ]
    for name, turns, error in cases:
        tok = templates.made(name)
        if error is None:
            assert chat.encode(turns, tok).tokens == tok.apply_chat_template(turns, return_dict=False)
            continue
        with pytest.raises(UserError, match=error):
            chat.encode(turns, tok)
    with pytest.raises(UserError, match=r"messages\[2\]: expected no tools in the paper's chat format"):
        chat.encode(talk(), small_tokenizer())
    with pytest.raises(UserError, match="conversations: tools: expected the same definitions"):
        chat.encode_many([with_tools(talk()), with_tools(talk(), TOOLS * 2)], templates.made(NAMES[0]))
    with pytest.raises(UserError, match="only supports single tool-calls"):
        chat.encode([*talk()[:2], {**call("a"), "tool_calls": call("a")["tool_calls"] * 2}], templates.made(NAMES[1]))


def test_reasoning_is_learnt_if_the_data_has_it():
    tok = copy.deepcopy(templates.made("qwen2.5"))
    block = "('<think>\\n\\n</think>\\n\\n' if loop.last and '</think>' not in message.content else '')"
    tok.chat_template = templates.QWEN25.replace(
        "+ message.content + '<|im_end|>'", f"+ {block} + message.content + '<|im_end|>'"
    )
    for reasoning, learnt in (("", ""), ("<think>\nBrr.\n</think>\n\n",) * 2):
        turns = [*talk()[:-1], message("assistant", reasoning + "Cold.")]
        encoded = chat.encode(with_tools(turns), tok, last_only=True)
        assert encoded.tokens == tok.apply_chat_template(turns, tools=TOOLS, return_dict=False)
        assert "</think>\n\nCold.<|im_end|>" in tok.decode(encoded.tokens)
        assert tok.decode(counted(encoded, encoded.loss_mask)) == f"{learnt}Cold.<|im_end|>"


def test_a_template_that_drops_results_or_contents_of_calls_is_refused():
    tok = copy.deepcopy(templates.made("qwen2.5"))
    tok.chat_template = templates.QWEN25.replace("{{- message.content }}", "")
    with pytest.raises(UserError, match=r"messages\[3\]: expected a content .*, got one that it drops"):
        chat.encode(talk(), tok)


def test_rows_with_tools(tmp_path):
    """Definitions and calls as objects or as JSON, as OpenAI has them."""
    tok, turns = templates.made("qwen2.5"), talk()
    as_json = copy.deepcopy(turns)
    function = as_json[2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    as_json[2]["content"] = None
    as_json[3] |= {"tool_call_id": "1", "name": "weather"}
    rows = [{"messages": turns, "tools": TOOLS}, {"messages": as_json, "tools": json.dumps(TOOLS)}]
    records = dataset.load(write_lines(tmp_path / "a.jsonl", *rows), "conversation")
    expected = tok.apply_chat_template(turns, tools=TOOLS, return_dict=False)
    assert [Encoder(tok)(record).tokens for record in records] == [expected] * 2
    pair = {"prompt": turns[:2], "chosen": turns[2:3], "rejected": [message("assistant", "No.")], "tools": TOOLS}
    (pair,) = dataset.load(write_lines(tmp_path / "b.jsonl", pair), "preference")
    chosen, rejected = Encoder(tok)(pair)
    assert chosen.tokens == tok.apply_chat_template(turns[:3], tools=TOOLS, return_dict=False)
    end = chat.markup(tok).end_of_turn
    assert tok.decode(counted(rejected, rejected.loss_mask)) == f"No.{tok.convert_ids_to_tokens(end)}"


@pytest.mark.parametrize(
    ("row", "kind", "error"),
    [
        ({"messages": talk(), "tools": "x"}, "conversation", "x: tools: expected a list of definitions"),
        ({"messages": talk(), "tools": [1]}, "conversation", "x: tools: expected a list of definitions"),
        ({"messages": talk()}, "text", "x: tool_calls: expected none in messages that become a text"),
        ({"messages": conversation("a", "b"), "tools": TOOLS}, "text", "x: tools: expected none in a text"),
        ({"messages": [*talk(), call("a", tool_calls="{")]}, "conversation", r"\.tool_calls: expected a list of calls"),
        (
            {"messages": [*talk(), call("a", tool_calls=[{"name": "f"}])]},
            "conversation",
            r"calls\[0\]: expected an object",
        ),
        (
            {"messages": [{**talk()[1], "tool_calls": [1]}, talk()[-1]]},
            "conversation",
            "a list of calls of the assistant",
        ),
    ],
)
def test_malformed_tools_are_named(row, kind, error):
    with pytest.raises(UserError, match=error):
        parse_record(row, kind, "x")


def test_conversations_that_are_joined_keep_their_tools():
    """Also those of a system message that is dropped, and with the loss on all tokens."""
    tok = templates.made("qwen2.5")
    first, second = talk(), talk("How is Bonn?", "Bonn")
    expected = chat.encode_many([with_tools(first), second], tok, repeat_system=False)
    for joined in ([with_tools(first), with_tools(second)], [first, with_tools(second)]):
        assert chat.encode_many(joined, tok, repeat_system=False) == expected
    with pytest.raises(UserError, match="tools: expected the same definitions for the whole conversation, got others"):
        chat.encode_many([with_tools(first), with_tools(second, TOOLS * 2)], tok, repeat_system=False)
    unlearnt = [{**turn, "train": False} if "tool_calls" in turn else turn for turn in second]
    records = [Conversation(with_tools(turns)) for turns in (first, unlearnt)]
    every = Encoder(tok, "all").joined(records)
    assert every.tokens == expected.tokens
    left_out = [target for target, on in zip(every.targets[:-1], every.loss_mask, strict=False) if not on]
    assert tok.decode(left_out).endswith('"Bonn", "days": 2}}\n</tool_call><|im_end|>')
