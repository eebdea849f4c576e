"""Records (text, conversations, preferences, labelled answers), parsed from forms that TRL documents; their encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dph import chat
from dph.chat import Encoded, Message
from dph.data.label_fields import LABEL_FIELDS, find_labels
from dph.data.labels import EncodedAnswers, Labelled
from dph.errors import UserError, check_text, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. Every token is a target.

    The end of the document is a target too, unless the text continues in the next record.
    """

    text: str
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with at least one from the assistant."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that end in the assistant's answer, the better one first."""

    chosen: list[Message]
    rejected: list[Message]


Record = Text | Conversation | Preference | Labelled
LABELLED = "labelled preference"  # kind of record: a Preference, or answers with other labels

PAIRED = ("preference", LABELLED)  # kinds for preference stages

# Kind of record -> fields that it can be made from.
EXPECTED_FIELDS = {
    "preference": "prompt, chosen and rejected (text or messages), or chosen and rejected (whole conversations)",
    LABELLED: "prompt, chosen and rejected (text or messages; rejected may be a list of texts), or chosen and rejected "
    "(whole conversations), or prompt, completion and label or labels, or prompt, completions and scores",
    "conversation": "messages, or prompt and completion, or a preference, whose chosen answer is taken",
    "text": "text, or a conversation, whose contents are joined",
}


def parse_record(fields: Mapping[str, Any], kind: str, where: str = "record", text_field: str = "text") -> Record:
    """Return one object of a JSONL file or hub data set as a record of ``kind``, a key of ``EXPECTED_FIELDS``.

    Raises UserError that begins with ``where`` if the fields are missing or malformed.
    """
    if kind == "text" and fields.get(text_field) is not None:
        check_text(fields[text_field], f"{where}: {text_field}")
        return Text(fields[text_field])
    may_have_labels = isinstance(fields.get("rejected"), list) or not LABEL_FIELDS.isdisjoint(fields)
    if kind == LABELLED and may_have_labels and (labelled := find_labels(fields, where)) is not None:
        name, answers, labels = labelled
        conversations = [_conversation(fields, "chosen", where)] if name == "rejected" else []
        for answer in answers:
            conversations.append(_conversation({"prompt": fields.get("prompt"), name: answer}, name, where))
        return Labelled(conversations, labels)
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        chosen, rejected = _conversation(fields, "chosen", where), _conversation(fields, "rejected", where)
        return Preference(chosen, rejected) if kind in PAIRED else from_messages(chosen, kind, where)
    if kind not in PAIRED and fields.get("messages") is not None:
        return from_messages(_messages(fields, "messages", "user", where), kind, where)
    if kind not in PAIRED and fields.get("prompt") is not None and fields.get("completion") is not None:
        # In TRL's unpaired preferences, false marks a bad answer.
        if fields.get("label") is not None and fields["label"] is not True:
            raise UserError(f"{where}: label: expected true with a completion to learn, got {shown(fields['label'])}")
        messages = _messages(fields, "prompt", "user", where) + _messages(fields, "completion", "assistant", where)
        return from_messages(messages, kind, where)
    present = shown_names(key if value is not None else f"{key} (null)" for key, value in fields.items())
    expected = EXPECTED_FIELDS[kind]
    if kind == "text":
        expected = expected.replace("text", text_field, 1)
    raise UserError(f"{where}: expected a {kind}: {expected}; got the fields {present}")


def from_messages(messages: list[Message], kind: str, where: str) -> Record:
    """Return messages as a conversation, or joined as text. Raises UserError for a conversation without an answer."""
    if kind == "text":
        return Text(chat.text(messages))
    chat.check_answered(messages, where)
    return Conversation(messages)


def _messages(fields: Mapping[str, Any], name: str, role: str, where: str) -> list[Message]:
    """Return the messages of a field; plain text becomes one message of ``role``."""
    value = fields[name]
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    chat.check(value, f"{where}: {name}")
    messages = []
    for message in value:
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _conversation(fields: Mapping[str, Any], name: str, where: str) -> list[Message]:
    """Return the whole conversation of the side ``name`` of a preference.

    The prompt is a field of its own, or repeated at the beginning of the side, or only there.
    """
    prompt = _messages(fields, "prompt", "user", where) if fields.get("prompt") else []
    if isinstance(fields[name], str) and not prompt:
        raise UserError(f"{where}: {name}: expected a prompt with an answer in plain text, got none")
    side = _messages(fields, name, "assistant", where)
    last_role = side[-1]["role"]
    if last_role != "assistant":
        raise UserError(f"{where}: {name}: expected the assistant's answer at the end, got a {last_role} message")
    repeats_prompt = side[: len(prompt)] == prompt or (side[0]["role"] != "assistant" and prompt[-1]["role"] == "user")
    return side if repeats_prompt else prompt + side


class Encoder:
    """Callable from records to tokens; a Preference gives (chosen, rejected), masked to their final answers.

    A Labelled gives its answers alike, with their labels.

    Raises UserError for a tokenizer without an EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._encode_text, self._eos = chat.plain(tokenizer), chat.eos_token(tokenizer)

    def __call__(self, record: Record | Encoded | tuple[Encoded, Encoded]) -> Encoded | tuple[Encoded, Encoded]:
        """Return the tokens of a record; a record that is already encoded is returned as it is."""
        if isinstance(record, Encoded | tuple):
            return record
        if isinstance(record, Preference):
            chosen = chat.encode(record.chosen, self.tokenizer, last_only=True)
            return chosen, chat.encode(record.rejected, self.tokenizer, last_only=True)
        if isinstance(record, Labelled):
            answers = [chat.encode(messages, self.tokenizer, last_only=True) for messages in record.answers]
            return EncodedAnswers(answers, record.labels)
        if isinstance(record, Conversation):
            return chat.encode(record.messages, self.tokenizer)
        tokens = self._encode_text(record.text)
        mask = [True] * len(tokens) + [not record.continues]
        return Encoded([self._eos, *tokens], [*tokens, self._eos], mask, mask, None)
