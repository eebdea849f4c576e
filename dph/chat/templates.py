"""Chat format of a model's own tokenizer: constant segments from its chat template, content between them.

For a sequence of roles the template is rendered once with sentinels in place of contents; the texts between sentinels
are its constant segments. Each conversation is then rendered by ``apply_chat_template`` itself, and has to consist of
the same segments and its contents, of which the template may trim whitespace and drop or move reasoning. Any other
change of a content is refused.

Control tokens come from constant segments only. There, and in a copy of the tokenizer, each of them gets a private
name; then the text is tokenised as a whole. A content that spells a control token does not spell its private name, and
stays text. Merges across borders, whitespace that a token strips and prefixes of pieces are as in
``apply_chat_template``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import proxy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dph.chat.tools import ToolFormat

    Messages = Sequence[Mapping[str, Any]]
    Key = tuple[tuple[tuple[str, str], ...], bool]  # (role, kind of content) of each message, and generation prompt
    Slot = tuple[int, str]  # index of a message, and the part of its content: whole, reasoning or answer
    Range = tuple[int, int]  # of characters

MOST_SKELETONS = 256
SPACE = re.compile(r"\s*")  # the characters that str.strip removes
BRACKETED = re.compile(r"[<\[].*[>\]]")  # an added token of markup; others are words that a user added
REASONING = ("<think>", "</think>")  # added tokens that belong to content

# Sentinels in place of contents, by the kinds of content that templates treat differently. An empty content has no
# slot, since a template may trim the segments around it.
SENTINELS = {
    "text": "\ue0d0{0}whole\ue0d1",
    "reasoning": "<think>\ue0d0{0}reasoning\ue0d1</think>\ue0d0{0}answer\ue0d1",
    "no reasoning": "<think></think>\ue0d0{0}answer\ue0d1",
    "tool response": "<tool_response>\ue0d0{0}response\ue0d1</tool_response>",
    "empty": "",
}
SLOT = re.compile(
    "<tool_response>\ue0d0([0-9]+)response\ue0d1</tool_response>"
    "|<think>(?:\ue0d0[0-9]+reasoning\ue0d1)?</think>\ue0d0([0-9]+)answer\ue0d1"
    "|\ue0d0([0-9]+)(whole|reasoning|answer)\ue0d1"
)

# Sequences of roles that are rendered to find a tokenizer's control tokens, and a conversation of the first one.
PROBES = (("user", "assistant"), ("user", "assistant", "user", "assistant"), ("system", "user", "assistant"))
EXAMPLE = ({"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day."})


class Refused(Exception):
    """Conversation or tokenizer without tokens in this format; ``index`` is the message's, None for all of them."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.index = index


@dataclass(slots=True)
class Skeleton:
    """Constant segments of a sequence of roles; ``slots[i]`` is between ``constants[i]`` and ``constants[i + 1]``."""

    constants: list[str]
    slots: list[Slot]
    renamed: tuple[list[str], list[list[int]]] | None = None  # ControlledTokenizer.rename, at the first use


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens of a conversation.

    The end of an assistant message is its end-of-turn token. ``contents`` and ``begins`` have all messages of the
    assistant, ``ends`` those whose turns have an end.
    """

    tokens: list[int]
    offsets: list[Range]  # characters of the tokens
    control: set[int]  # positions of control tokens
    contents: dict[int, Range]  # message -> characters of its content
    begins: dict[int, int]  # message -> position after the last control token before its content
    ends: dict[int, int]  # message -> position of its end

    def answer(self, message: int) -> tuple[int, list[bool]]:
        """Return the position of a message's first token, and for each before its end whether it has content."""
        start, stop = self.contents[message]
        begin, end = self.begins[message], self.ends[message]
        while begin < end and self.offsets[begin][1] <= start:
            begin += 1
        has_content = []
        for i in range(begin, end):
            has_content.append(start < stop and self.offsets[i][0] < stop and i not in self.control)
        return begin, has_content


class ControlledTokenizer:
    """Copy of a tokenizer's backend in which control tokens have private names, in vocabulary and text.

    Attributes:
        ids: control token -> id.
    """

    def __init__(self, backend: Any, described: dict[str, Any], control: set[str]) -> None:
        """``described`` is the backend as JSON, and is changed."""
        secret = os.urandom(8).hex()
        self.ids, self._names = {}, {}
        for token in sorted(control):
            self.ids[token] = backend.token_to_id(token)
            self._names[token] = f"\U000f0d50{secret}{len(self._names)}\U000f0d51"
        added = [token["content"] for token in described["added_tokens"]]
        _rename_tokens(described, self._names)
        try:
            self._backend = type(backend).from_str(json.dumps(described))
        except Exception as error:  # tokenizers has no other kind
            raise Refused(f"expected parts that fit each other (two tokens of one id?), got: {error}") from error
        self._original_ids = {}  # for added tokens whose private name has another id
        for token in added:
            renamed, original = self._backend.token_to_id(self._names.get(token, token)), backend.token_to_id(token)
            if renamed != original:
                self._original_ids[renamed] = original
        self._added = sorted(added, key=len, reverse=True)

    def rename(self, constants: list[str]) -> tuple[list[str], list[list[int]]]:
        """Return constant segments with the private names of control tokens, and the ids of these."""
        text = "\0".join(constants)
        present = [token for token in self._added if token in text]  # the longest match first, as in tokenizers
        pattern = re.compile("|".join(map(re.escape, present)) or "(?!)")
        renamed, ids = [], []
        for constant in constants:
            control = []
            for token in pattern.findall(constant):
                if token in self.ids:
                    control.append(self.ids[token])
            renamed.append(pattern.sub(lambda match: self._names.get(match[0], match[0]), constant))
            ids.append(control)
        return renamed, ids

    def encode(self, text: str) -> tuple[list[int], list[Range]]:
        """Return ids and the characters [start, stop] of each."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens = encoding.ids
        if self._original_ids:
            tokens = [self._original_ids.get(token, token) for token in tokens]
        return tokens, encoding.offsets


def _rename_tokens(described: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in a backend's JSON, in place; merges that give a renamed token are removed."""
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    # A token of one character stays in the model: byte-level models drop characters that they lack.
    names = {token: name for token, name in names.items() if len(token) > 1}
    model = described["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        for token, name in names.items():
            if token in vocabulary:
                vocabulary[name] = vocabulary.pop(token)
    else:  # Unigram
        for entry in vocabulary:
            entry[0] = names.get(entry[0], entry[0])
    if "merges" in model:
        merges = []
        for merge in model["merges"]:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            if left not in names and right not in names and left + right not in names:
                merges.append(merge)
        model["merges"] = merges
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    described.update(post_processor=None, truncation=None, padding=None)


class TemplateFormat:
    """Chat format of a tokenizer that has a chat template of its own.

    Attributes:
        size: of the tokenizer's vocabulary.
        template: the chat template.
        eos: token between documents.
        end_of_turn: token that ends the assistant's turn; its hidden state gives the reward.
        tail: the end-of-turn token, and the constant tokens after it at the end of a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: int) -> None:
        if not tokenizer.is_fast:
            raise Refused("expected a fast tokenizer (tokenizer.json) for its own chat template, got a slow one")
        self.size, self.template, self.eos = len(tokenizer), tokenizer.chat_template, eos
        self._tokenizer = proxy(tokenizer)  # the format is a value of a weak dictionary, which must not keep its key
        self._skeletons: dict[Key, Skeleton] = {}
        self.for_tools: ToolFormat | None = None  # at the first use
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        unknown, control = _unknown_token(described["model"]), self._control_tokens(described["added_tokens"])
        self._controlled = ControlledTokenizer(tokenizer.backend_tokenizer, described, control)
        # Text outside of the vocabulary gives the unknown token, which controls nothing unless it is BOS or EOS too.
        self._control = set(self._controlled.ids.values())
        if unknown not in (None, tokenizer.eos_token, tokenizer.bos_token):
            self._control.discard(self._controlled.ids.get(unknown))
        self.end_of_turn = self._find_end_of_turn()
        rendered = self.render(EXAMPLE)
        expected = tokenizer.apply_chat_template(list(EXAMPLE), tokenize=True, return_dict=False)
        if rendered.tokens != expected:
            raise Refused("expected the tokens of its backend (tokenizer.json) from apply_chat_template, got others")
        self.tail = rendered.tokens[rendered.ends[1] :]

    def controlled(self, is_control: Callable[[str, bool, str], bool]) -> ControlledTokenizer:
        """Return a copy of the backend for other control tokens.

        ``is_control`` is called with each added token, whether it is special, and the chat template for tools.
        """
        template = self._tokenizer.get_chat_template(tools=[])
        described, control = json.loads(self._tokenizer.backend_tokenizer.to_str()), set()
        for token in described["added_tokens"]:
            special = token["special"] or token["content"] in self._tokenizer.all_special_tokens
            if is_control(token["content"], special, template):
                control.add(token["content"])
        return ControlledTokenizer(self._tokenizer.backend_tokenizer, described, control)

    def _control_tokens(self, added: list[dict[str, Any]]) -> set[str]:
        """Return the special tokens, and the other added tokens of markup that the template writes between contents."""
        constants = []
        for roles in PROBES:
            for generate in (False, True):
                key = (tuple((role, "text") for role in roles[: len(roles) - generate]), generate)
                try:
                    segments = self._skeleton(key).constants
                    # Before a user's content there may be a default prompt: prose about other markup.
                    constants += segments if roles[0] == "system" else segments[1:]
                except Refused:
                    if key == _plain_key(EXAMPLE):
                        raise
        text, control = "\0".join(constants), set(self._tokenizer.all_special_tokens)
        for token in added:
            content = token["content"]
            if token["special"] or (content in text and BRACKETED.fullmatch(content) and content not in REASONING):
                control.add(content)
        return control.intersection(token["content"] for token in added)

    def _find_end_of_turn(self) -> int:
        """Return the first control token after the assistant's content."""
        after = self._skeleton(_plain_key(EXAMPLE)).constants[-1]
        _, ((*control,),) = self._controlled.rename([after])
        if not control:
            got = repr(after[:40]) if after else "nothing"
            raise Refused(
                f"expected a chat template that ends the assistant's turn with a control token, got {got}; "
                "tokenizer.chat_template = dph.chat.TEMPLATE gives the paper's format"
            )
        return control[0]

    def render(self, messages: Messages, generate: bool = False) -> Rendered:
        """Return the tokens of a conversation; with ``generate`` up to the beginning of an answer.

        Raises Refused with the template's own words if it raises, and if it changes or drops a content.
        """
        messages = [dict(message) for message in messages]
        text = self.write(messages, generate)
        skeleton, ranges = self._align(text, messages, generate)
        if skeleton.renamed is None:
            skeleton.renamed = self._controlled.rename(skeleton.constants)
        renamed, control = skeleton.renamed[0], []
        for ids in skeleton.renamed[1]:
            control.append([token for token in ids if token in self._control])
        pieces, length, slots = [renamed[0]], len(renamed[0]), []
        for (start, stop), constant in zip(ranges, renamed[1:], strict=True):
            slots.append((length, length + stop - start))
            pieces += text[start:stop], constant
            length += stop - start + len(constant)
        tokens, offsets = self._controlled.encode("".join(pieces))
        positions = []
        for i, token in enumerate(tokens):
            if token in self._control:
                positions.append(i)
        self._check_control([tokens[i] for i in positions], [token for ids in control for token in ids])
        contents, begins, ends = {}, {}, {}
        before = 0  # number of control tokens
        for (i, _), (start, stop), ids, ids_after in zip(skeleton.slots, slots, control, control[1:], strict=False):
            before += len(ids)
            if messages[i]["role"] != "assistant":
                continue
            if i not in begins:
                begins[i] = positions[before - 1] + 1 if before else 0
            contents[i] = (contents.get(i, (start, stop))[0], stop)
            if self.end_of_turn in ids_after[:1]:
                ends[i] = positions[before]
        return Rendered(tokens, offsets, set(positions), contents, begins, ends)

    def _check_control(self, got: list[int], expected: list[int]) -> None:
        """Raise Refused unless the control tokens are those of the constant segments."""
        if got != expected:
            counts = Counter(got)
            counts.subtract(expected)
            differing = [token for token, count in counts.items() if count] or got
            names = ", ".join(self._tokenizer.convert_ids_to_tokens(differing))
            raise Refused(f"expected the control tokens of the chat template alone, got others next to text: {names}")

    def write(self, messages: Messages, generate: bool, tools: Sequence[Any] | None = None) -> str:
        """Return the text that the chat template gives. Raises Refused with the template's words if it raises."""
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program of others
            raise Refused(f"expected messages that the tokenizer's chat template accepts, got its: {error}") from error

    def _skeleton(self, key: Key, renew: bool = False) -> Skeleton:
        """Return the constant segments of a sequence of roles, rendered once unless ``renew``."""
        if not renew and (skeleton := self._skeletons.get(key)):
            return skeleton
        kinds, generate = key
        messages = []
        for i, (role, kind) in enumerate(kinds):
            messages.append({"role": role, "content": SENTINELS[kind].format(i)})
        text = self.write(messages, generate)
        constants, slots, position = [], [], 0
        for match in SLOT.finditer(text):
            slots.append((int(match[1] or match[2] or match[3]), match[4] or "whole"))
            constants.append(text[position : match.start()])
            position = match.end()
        constants.append(text[position:])
        for i, (role, kind) in enumerate(kinds):
            own = [k for k, slot in enumerate(slots) if slot[0] == i]
            if kind != "empty" and not any(slots[k][1] != "reasoning" for k in own):
                raise Refused(
                    f"expected contents in the chat template's text, got {role}'s, which it drops or changes", i
                )
            if role == "assistant" and own[-1] - own[0] + 1 != len({slots[k][1] for k in own}):
                raise Refused("expected a chat template that writes an answer once, got one that repeats it", i)
        if len(self._skeletons) >= MOST_SKELETONS:
            self._skeletons.clear()
        skeleton = self._skeletons[key] = Skeleton(constants, slots)
        return skeleton

    def _align(self, text: str, messages: Messages, generate: bool) -> tuple[Skeleton, list[Range]]:
        """Return the skeleton of a rendered conversation, and the characters of each of its slots.

        Contents are taken as plain text first, then by their kinds, then with segments rendered again: those of
        another day may have its date.
        """
        keys = [_plain_key(messages, generate)]
        kinds = [_kind(message) for message in messages]
        for special in ({"reasoning", "no reasoning"}, set(SENTINELS)):
            roles = []
            for message, kind in zip(messages, kinds, strict=True):
                roles.append((message["role"], kind if kind in special else "text"))
            keys.append((tuple(roles), generate))
        for renew in (False, True):
            for key in dict.fromkeys(keys):
                skeleton = self._skeleton(key, renew)
                ranges, complete = _slot_ranges(text, skeleton, messages)
                if complete:
                    return skeleton, ranges
        index = skeleton.slots[len(ranges)][0] if len(ranges) < len(skeleton.slots) else None
        keys = {key for message in messages for key in message} - {"role", "content"}
        got = f"one that it changes, or uses of {', '.join(sorted(map(str, keys)))}" if keys else "one that it changes"
        raise Refused(f"expected a content that the tokenizer's chat template writes as it is, got {got}", index)


def _unknown_token(model: dict[str, Any]) -> str | None:
    """Return the token that a model of a backend gives for text outside of its vocabulary."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _plain_key(messages: Messages, generate: bool = False) -> Key:
    """Return the key of the skeleton in which all contents are plain text."""
    return tuple((message["role"], "text") for message in messages), generate


def _kind(message: Mapping[str, Any]) -> str:
    """Return the kind of a message's content."""
    role, content = message["role"], message["content"]
    if role == "assistant" and "</think>" in content:
        return "reasoning" if _parts(content, "reasoning")[0].strip("\n") else "no reasoning"
    if role == "user" and not content.strip():
        return "empty"
    if role == "user" and content.startswith("<tool_response>") and content.endswith("</tool_response>"):
        return "tool response"
    return "text"


def _parts(content: str, part: str) -> list[str]:
    """Return the texts that templates take for a part of a content."""
    if part == "whole":
        return [content]
    head, *_, tail = content.split("</think>")
    if part == "reasoning":
        return [head.split("<think>")[-1], head]
    return [tail, content[len(head) + len("</think>") :]]


def _slot_ranges(text: str, skeleton: Skeleton, messages: Messages) -> tuple[list[Range], bool]:
    """Return the characters of the slots up to the first whose content does not fit, and whether all of text does."""
    constants, ranges = skeleton.constants, []
    if not text.startswith(constants[0]):
        return ranges, False
    position = len(constants[0])
    for (i, part), constant in zip(skeleton.slots, constants[1:], strict=True):
        for content in _parts(messages[i]["content"], part):
            stop = _fit(text, position, content, constant)
            if stop is not None:
                break
        else:
            return ranges, False
        ranges.append((position, stop))
        position = stop + len(constant)
    return ranges, position == len(text)


def _fit(text: str, position: int, content: str, constant: str) -> int | None:
    """Return the end of ``content``, with or without whitespace at its ends, from ``position`` up to ``constant``."""
    core, lead, trail = content.strip(), "", content
    if core:
        before, stop = position, SPACE.match(text, position).end()
        lead = content[: len(content) - len(content.lstrip())]
        if not text.startswith(core, stop) or not lead.endswith(text[before:stop]):
            return None
        trail = content[len(lead) + len(core) :]
        position = stop + len(core)
    space = text[position : SPACE.match(text, position).end()]
    if constant.strip():
        kept = len(space) - SPACE.match(constant).end()
        fits = kept >= 0 and (trail.startswith(space[:kept]) if core else space[:kept] in trail)
        return position + kept if fits and text.startswith(constant, position + kept) else None
    kept = 0  # as much as possible before a segment of whitespace
    while kept < min(len(space), len(trail)) and space[kept] == trail[kept]:
        kept += 1
    while kept >= 0 and not text.startswith(constant, position + kept):
        kept -= 1
    return position + kept if kept >= 0 else None
