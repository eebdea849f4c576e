"""Conversations with tools: definitions, calls of the assistant and results, rendered by a model's own chat template.

The template writes them as JSON and markup of its own, so that contents have no fixed slots as in
``dph.chat.templates``. Each conversation is rendered twice: as it is, and with a private character in place of each
character of control tokens in all of its texts. What still spells a control token is the template's. The two texts have
to be the same otherwise, so a template whose choices depend on such characters is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dph.chat.templates import ControlledTokenizer, TemplateFormat

    Messages = Sequence[Mapping[str, Any]]

FIRST_PRIVATE = 0xF0E00  # code point of the first private character
REASONING = re.compile(r"(</?think>)")  # which templates look for in contents
EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")
MARKUP = re.compile(r"[<\[].*[>\]]")  # an added token of markup
OWN_KEYS = ("tools", "train")  # of messages, which the template does not get
PROBE = [{"role": "user", "content": "Hello"}]


class ToolsRefused(Exception):
    """Conversation with tools that has no tokens in this format; ``index`` is the message's, None for all of them."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True, slots=True)
class RenderedTools:
    """Tokens of a conversation, as ``dph.chat.templates.Rendered``.

    Attributes:
        begins, ends: message of the assistant -> positions of the first token of its turn, and of the token that ends
            it.
    """

    tokens: list[int]
    begins: dict[int, int]
    ends: dict[int, int]

    def answer(self, message: int) -> tuple[int, list[bool]]:
        """Return the position of a turn's first token, and for each before its end that it counts."""
        return self.begins[message], [True] * (self.ends[message] - self.begins[message])


def uses_tools(messages: Messages) -> bool:
    """Return whether a conversation has definitions, calls or results of tools."""
    return any(message["role"] == "tool" or "tools" in message or "tool_calls" in message for message in messages)


class ToolFormat:
    """Format of conversations with tools in a tokenizer's own chat template."""

    def __init__(self, marks: TemplateFormat) -> None:
        self._marks = marks
        self._controlled: ControlledTokenizer = marks.controlled(self._is_control)
        characters: set[str] = set()
        for token in self._controlled.ids:
            # Without those of identifiers, by which a template gets at the fields of a message.
            punctuation = {c for c in token if not c.isalnum() and not c.isspace() and c not in "_-."}
            characters |= punctuation or set(token)
        self._shield = {ord(c): chr(FIRST_PRIVATE + i) for i, c in enumerate(sorted(characters))}
        self._unshield = {ord(private): chr(c) for c, private in self._shield.items()}
        before, after = marks.write(PROBE, False), marks.write(PROBE, True)
        if not after.startswith(before) or after == before:
            raise ToolsRefused("expected a chat template that begins an answer with a constant, to find calls of tools")
        (self._header,), _ = self._controlled.rename([after[len(before) :]])

    @staticmethod
    def _is_control(token: str, special: bool, template: str) -> bool:
        return special or (MARKUP.fullmatch(token) is not None and not REASONING.fullmatch(token) and token in template)

    def render(self, messages: Messages, generate: bool = False) -> RenderedTools:
        """Return the tokens of a conversation; with ``generate`` up to the beginning of an answer.

        Raises ToolsRefused for what the template does not write, and refusals of the template as ``TemplateFormat``.
        """
        definitions = [message["tools"] for message in messages if "tools" in message]
        tools = definitions[0] if definitions else None
        if any(other != tools for other in definitions):
            raise ToolsRefused("tools: expected the same definitions for the whole conversation, got others")
        own = [{key: value for key, value in message.items() if key not in OWN_KEYS} for message in messages]
        text = self._marks.write(own, generate, tools)
        shielded = self._marks.write(self._shielded(own), generate, self._shielded(tools))
        if shielded.translate(self._unshield) != text:
            raise ToolsRefused("expected texts without markup that the tokenizer's chat template acts on, got some")
        if tools is not None and text == self._marks.write(own, generate):
            raise ToolsRefused(
                "tools: expected a chat template that writes definitions of tools, got one that does not"
            )
        (renamed,), (control,) = self._controlled.rename([shielded])
        text = renamed.translate(self._unshield)
        tokens, offsets = self._controlled.encode(text)
        known = set(self._controlled.ids.values())
        if [token for token in tokens if token in known] != control:
            raise ToolsRefused("expected the control tokens of the chat template alone, got others next to text")
        starts = self._starts(text, messages, generate)
        begins, ends, position = {}, {}, 0
        for i, start in starts.items():
            while position < len(tokens) and offsets[position][1] <= start:
                position += 1
            begins[i] = position
            while position < len(tokens) and tokens[position] != self._marks.end_of_turn:
                position += 1
            if position == len(tokens):
                raise ToolsRefused("expected a chat template that ends this turn with its end-of-turn token", i)
            ends[i] = position
        limits = [offsets[ends[i]][0] for i in starts]
        _check_written(text, messages, starts, limits)
        return RenderedTools(tokens, begins, ends)

    def _starts(self, text: str, messages: Messages, generate: bool) -> dict[int, int]:
        """Return where the turns of the assistant's messages start in a text, after their header."""
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        headers = [match.end() for match in re.finditer(re.escape(self._header), text)]
        if len(headers) != len(indices) + generate:
            raise ToolsRefused(
                f"expected a chat template that writes a turn for each message of the assistant ({len(indices)}), got "
                f"{len(headers) - generate} turns"
            )
        starts = {}
        for i, start in zip(indices, headers, strict=False):
            if "</think>" not in messages[i]["content"] and (empty := EMPTY_REASONING.match(text, start)):
                start = empty.end()
            starts[i] = start
        return starts

    def _shielded(self, value: Any) -> Any:
        """Return a value with private characters in its texts; names of fields in JSON are texts, too."""
        if isinstance(value, str):
            parts = REASONING.split(value)
            parts[::2] = [part.translate(self._shield) for part in parts[::2]]
            return "".join(parts)
        if isinstance(value, Mapping):
            return {self._shielded(key): self._shielded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._shielded(item) for item in value]
        return value


def _check_written(text: str, messages: Messages, starts: dict[int, int], limits: list[int]) -> None:
    """Raise ToolsRefused unless contents are in a text one after another, and calls in the turns of their messages."""
    position, limits_of = 0, dict(zip(starts, limits, strict=True))
    for i, message in enumerate(messages):
        content = message["content"].split("</think>")[-1].strip()
        if i in starts:
            position = max(position, starts[i])
        found = _find(text, content, position)
        if found is None and message["role"] == "system":  # some templates write it next to the definitions
            found = position if _find(text, content, 0) is not None else None
        if found is None or (i in starts and found > limits_of[i]):
            raise ToolsRefused("expected a content that the tokenizer's chat template writes, got one that it drops", i)
        position = found
        if i not in starts:
            continue
        turn = text[starts[i] : limits_of[i]]
        for leaf in _leaves([call["function"] for call in message.get("tool_calls", ())]):
            if _find(turn, leaf, 0) is None:
                raise ToolsRefused("tool_calls: expected calls that the chat template writes, got one that it drops", i)


def _find(text: str, part: str, position: int) -> int | None:
    """Return the end of a part of a text from a position on, as it is or in JSON; None if it is not there."""
    for written in (part, json.dumps(part, ensure_ascii=False)[1:-1]):
        start = text.find(written, position)
        if start >= 0:
            return start + len(written)
    return None


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts of names and arguments of calls."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
