"""Rows and turns of other programs' formats, converted to ours: ShareGPT, Alpaca, OpenAI's fine-tuning files.

Keys that carry meaning are supported or refused by name. Others are left for the caller to report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dph.errors import UserError, check_text, shown, shown_names

if TYPE_CHECKING:
    from dph.chat import Message

# Own names that ``columns`` may give to fields.
FIELDS = (
    "text", "messages", "prompt", "completion", "completions", "chosen", "rejected", "system", "conversations",
    "instruction", "input", "output", "preferred_output", "non_preferred_output", "label", "labels", "scores", "margin",
)  # fmt: skip
# Fields without which a row means something else; none of them is supported, so that a value is refused.
REFUSED_FIELDS = (
    "functions", "tool_calls", "function_call", "images", "image", "videos", "video", "audios", "audio",
    "history", "chat_template_kwargs", "system_prompt", "system_message", "reasoning_content", "thinking",
)  # fmt: skip
REFUSED_TURN_FIELDS = (
    "function_call", "tools", "functions", "reasoning_content", "reasoning", "thinking",
    "images", "image", "videos", "video", "audios", "audio",
)  # fmt: skip
TOOL_FIELDS = ("tool_calls", "tool_call_id")
TRAIN_FLAGS = ("weight", "train", "loss")
TURN_FIELDS = {"role", "content", "tool_calls", "tool_call_id", *TRAIN_FLAGS}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "developer": "system"}
# JSON of a list of messages, and what Python prints for one.
JSON_MESSAGES = re.compile(r"\s*\[\s*\{\s*\"(?:role|content|from|value)\"\s*:")
PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")


def check_columns(columns: Mapping[Any, Any]) -> None:
    """Raise UserError unless ``columns`` is a mapping from own names to names of the data."""
    for own, name in columns.items():
        if own not in FIELDS:
            raise UserError(f"columns: expected own names of {', '.join(FIELDS)}, got {shown(own)}")
        if not isinstance(name, str):
            raise UserError(f"columns.{own}: expected the name of a field of the data, got {shown(name)}")


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return a row with the own names of ``columns``. Raises UserError if one of the fields is missing."""
    row = dict(fields)
    for own, name in columns.items():
        if name not in fields:
            raise UserError(f"{where}: columns.{own}: expected the field {name}, got the fields {shown_names(fields)}")
        row.pop(name, None)
    for own, name in columns.items():
        row[own] = fields[name]
    return row


def is_one_of(value: Any, wanted: Sequence[Any]) -> bool:
    """Return whether a value is one of those that a filter lists; a table in text has texts in place of numbers."""
    for other in wanted:
        if value == other and isinstance(value, bool) == isinstance(other, bool):
            return True
        if isinstance(value, str) and isinstance(other, int | float) and value.lower() == str(other).lower():
            return True
    return False


def own_fields(fields: Mapping[str, Any], where: str, with_tools: bool = False) -> dict[str, Any]:
    """Return a row of another program with our fields, and those that it has besides.

    Raises UserError for a field of ``REFUSED_FIELDS`` that has a value, for tools unless ``with_tools``, and for a row
    that is marked as not trained.
    """
    row = dict(fields)
    _refuse(row, REFUSED_FIELDS if with_tools else (*REFUSED_FIELDS, "tools"), where)
    for name in TRAIN_FLAGS:
        value = row.get(name)
        if (isinstance(value, int | float) and value == 0) or (name == "weight" and value not in (None, 1)):
            raise UserError(
                f"{where}: {name}: expected rows of one weight (a source has a weight, a filter leaves rows out), got "
                f"{shown(value)}"
            )
    has_answers = row.get("chosen") is not None and row.get("rejected") is not None
    has_answers = has_answers or row.get("completion") is not None or row.get("completions") is not None
    for name in ("conversations", "conversation"):  # ShareGPT
        own = "prompt" if has_answers else "messages"
        if row.get(name) is not None and row.get(own) is None:
            row[own] = row.pop(name)
    if isinstance(row.get("input"), Mapping) and row.get("preferred_output") is not None:  # OpenAI's preferences
        request = dict(row.pop("input"))
        _refuse(request, REFUSED_FIELDS if with_tools else (*REFUSED_FIELDS, "tools"), f"{where}: input")
        if request.get("tools"):
            row["tools"] = request.pop("tools")
        row["prompt"], row["chosen"] = request.pop("messages", None), row.pop("preferred_output")
        row["rejected"] = row.pop("non_preferred_output", None)
        for name, value in request.items():
            row[f"input.{name}"] = value
    if row.get("instruction") is not None and row.get("prompt") is None and row.get("messages") is None:  # Alpaca
        parts = []
        for name in ("instruction", "input"):
            value = row.pop(name, None)
            if value is not None:
                check_text(value, f"{where}: {name}")
            if value:
                parts.append(value)
        row["prompt"] = "\n\n".join(parts)
        if row.get("completion") is None:
            row["completion"] = row.pop("output", None)
    return row


def with_system(system: Any, messages: list[Message], where: str) -> list[Message]:
    """Return messages that begin with the system message of a row. Raises UserError if they have another one."""
    check_text(system, f"{where}: system")
    if messages and messages[0]["role"] == "system":
        _check_same_system(system, messages[0]["content"], f"{where}: system")
        return messages
    return [{"role": "system", "content": system}, *messages]


def tools_of(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """Return the definitions of tools of a row, also of JSON; None if it has none."""
    tools = _from_json_list(fields.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: tools: expected a list of definitions (objects), got {shown(tools)}")
    return tools


def _from_json_list(value: Any) -> Any:
    """Return the value of a text that is JSON of a list; another value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _calls(value: Any, where: str) -> list[Any]:
    """Return calls of tools whose arguments are objects; OpenAI has them as JSON."""
    calls = _from_json_list(value)
    if not isinstance(calls, list):
        raise UserError(f"{where}: expected a list of calls, got {shown(value)}")
    result = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}[{i}]: arguments: expected an object, or JSON of one: {error}") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        result.append(call)
    return result


def turn(message: Any, where: str, ignored: set[str] | None, with_tools: bool = False) -> Any:
    """Return a message of another program as ours; a value that is no message as it is.

    ``train`` is False for an answer that is not to be learnt. Raises UserError for a field of ``REFUSED_TURN_FIELDS``
    that has a value, for calls and results of tools unless ``with_tools``, a weight other than 0 and 1, and parts of a
    content that are no text.
    """
    if not isinstance(message, Mapping):
        return message
    message = dict(message)
    if "role" not in message and "from" in message and "value" in message:  # ShareGPT
        message["role"], message["content"] = message.pop("from"), message.pop("value")
    if message.get("tool_calls") and message.get("content") is None:
        message["content"] = ""
    if "role" not in message or "content" not in message:
        return message
    _refuse(message, REFUSED_TURN_FIELDS if with_tools else (*REFUSED_TURN_FIELDS, *TOOL_FIELDS), where)
    role, content = message["role"], message["content"]
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list):
        content = _joined_parts(content, f"{where}.content", ignored)
    result = {"role": role, "content": content}
    if message.get("tool_calls") and message["tool_calls"] != "[]":
        result["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    for name in ("tool_call_id", "name"):
        if role == "tool" and message.get(name) is not None:
            result[name] = message[name]
    trained = _is_trained(message, where)
    if trained is False and role == "assistant":
        result["train"] = False
    elif trained and role != "assistant":
        raise UserError(f"{where}: expected weight 0 or none for a {role} message, which is never trained, got 1")
    _add_unused(ignored, message, {*TURN_FIELDS, "name"} if role == "tool" else TURN_FIELDS, "messages.")
    return result


def from_json(text: str, where: str) -> list[Any] | None:
    """Return the messages of a text that is JSON of a list of messages; None for any other text.

    Raises UserError if the text begins as such a list and is no JSON.
    """
    if PYTHON_MESSAGES.match(text):
        raise UserError(f"{where}: expected messages as a list or as JSON, got a list as Python prints it")
    if not JSON_MESSAGES.match(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a list of messages, got a text that is not quite one: {error}") from None


def joined(prompt: list[Message], side: list[Message], where: str) -> list[Message]:
    """Return the conversation of a prompt and a side of a preference, which may repeat the end of the prompt.

    A side may also be the whole conversation, or repeat of it only what precedes the answer; it may lack the system
    message. Raises UserError if it begins with another message than the one that the prompt ends with.
    """
    system, prompt = _split_system(prompt)
    own_system, side = _split_system(side)
    if system and own_system:
        _check_same_system(system[0]["content"], own_system[0]["content"], where)
    conversation = _overlapped(prompt, side)
    if conversation is None:
        raise UserError(
            f"{where}: expected an answer to the prompt, or a conversation that repeats its end, got one that begins "
            f"with another {side[0]['role']} message: {shown(side[0]['content'])}"
        )
    return (system or own_system) + conversation


def _overlapped(prompt: list[Message], side: list[Message]) -> list[Message] | None:
    """Return ``joined`` without system messages; None if the two contradict each other."""
    before, after = _contents(prompt), _contents(side)
    for size in range(min(len(prompt), len(side)), 0, -1):
        if before[-size:] == after[:size]:
            return prompt[:-size] + side
    if prompt and before == after[-1 - len(prompt) : -1]:  # the prompt is the last question of a whole conversation
        return side
    if prompt and prompt[-1]["role"] == side[0]["role"] == "user":
        return None
    return prompt + side


def _contents(messages: list[Message]) -> list[tuple[str, str, Any]]:
    """Return what two messages are compared by: whitespace around a content makes no difference."""
    return [(message["role"], message["content"].strip(), message.get("tool_calls")) for message in messages]


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return the system message at the beginning, as a list of at most one, and the messages after it."""
    count = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def _check_same_system(expected: str, got: str, where: str) -> None:
    if expected.strip() != got.strip():
        raise UserError(f"{where}: expected one system message, got two: {shown(expected)} and {shown(got)}")


def _refuse(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Raise UserError if one of the fields has a value; null and empty lists, also as JSON, are none."""
    for name in names:
        if fields.get(name) and fields[name] not in ("[]", "{}", "null"):
            hint = f" (columns: {{system: {name}}} in the source reads it)" if name.startswith("system") else ""
            raise UserError(f"{where}: {name}: not supported, expected none{hint}, got {shown(fields[name])}")


def _is_trained(message: Mapping[str, Any], where: str) -> bool | None:
    """Return whether the flags of an answer say that it is to be learnt; None without a flag."""
    trained = None
    for name in TRAIN_FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise UserError(f"{where}.{name}: expected 0 or 1, got {shown(value)}")
        if trained is not None and trained != bool(value):
            raise UserError(f"{where}.{name}: expected what the other flags of this message say, got {shown(value)}")
        trained = bool(value)
    return trained


def _joined_parts(parts: list[Any], where: str, ignored: set[str] | None) -> str:
    """Return the text of a content that is a list of parts. Raises UserError for a part that is no text."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            got = f"type {shown(part.get('type'))}" if isinstance(part, Mapping) else shown(part)
            raise UserError(f"{where}[{i}]: expected a part of type text, got {got}")
        check_text(part.get("text"), f"{where}[{i}].text")
        texts.append(part["text"])
        _add_unused(ignored, part, {"type", "text"}, "messages.content.")
    return "".join(texts)


def _add_unused(ignored: set[str] | None, fields: Mapping[str, Any], used: set[str], prefix: str) -> None:
    if ignored is not None:
        for name in fields.keys() - used:
            if fields[name] is not None:
                ignored.add(f"{prefix}{name}")
