"""Records (plain text, conversations, preferences, labelled answers) and their encoder.

Rows have the fields that TRL documents; ``dph.data.conversions`` and ``dph.data.rendered`` read other programs' forms,
``dph.data.label_fields`` labels.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dph import chat
from dph.chat import Encoded, Message
from dph.data import conversions
from dph.data.label_fields import LABEL_FIELDS, USED_FIELDS, check_good, find_labels
from dph.data.labels import EncodedAnswers, Label, Labelled
from dph.data.rendered import SUSPECT, parse, recognise, refuse
from dph.errors import UserError, check_text, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dph.data.files import Documents, Visit
    from dph.data.json_lines import JsonLines
    from dph.data.row_format import RowFormat


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


# Longest text of a record, in characters; longer ones are split. A stream takes whole records: a corpus in one record
# would be read by every stream at once, and every checkpoint would hold the rest of it.
MAX_TEXT = 2**16

Record = Text | Conversation | Preference | Labelled
LABELLED = "labelled preference"  # kind of record: a Preference, or answers with other labels
PAIRED = ("preference", LABELLED)  # kinds for preference stages

# Kind of record -> fields that it can be made from.
EXPECTED_FIELDS = {
    "preference": "prompt, chosen and rejected (text or messages), or chosen and rejected (whole conversations)",
    LABELLED: "prompt, chosen and rejected (text or messages; rejected may be a list of texts), or chosen and rejected "
    "(whole conversations), or prompt and completion, or messages, with label or labels, or prompt, completions and "
    "scores",
    "conversation": "messages, or prompt and completion, or a preference, whose chosen answer is taken",
    "text": "text, or a conversation, whose contents are joined",
}
# A row with no other fields is read as it is; any other is first converted (dph.data.conversions).
OWN_FIELDS = LABEL_FIELDS | {"text", "messages", "prompt", "completion", "completions", "chosen", "rejected"}


def parse_record(
    fields: Mapping[str, Any],
    kind: str,
    where: str = "record",
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    rendered: bool = False,
    ignored: set[str] | None = None,
) -> Record:
    """Return one object of a file or hub data set as a record of ``kind``, a key of ``EXPECTED_FIELDS``.

    Args:
        fields: the object; null is no value.
        kind: of the record.
        where: beginning of error messages.
        text_field: field that holds plain text.
        columns: own name -> name in ``fields``.
        rendered: texts are conversations in the markup of a chat format (``dph.data.rendered``).
        ignored: the names of fields with a value that the record does not depend on are added to it.

    Raises UserError if fields are missing, malformed, or of a meaning that is not supported.
    """
    if columns:
        fields = conversions.renamed(fields, columns, where)
    is_text, tools = kind == "text" and fields.get(text_field) is not None, None
    if not is_text and not fields.keys() <= OWN_FIELDS:
        fields = conversions.own_fields(fields, where, with_tools=True)
        tools = conversions.tools_of(fields, where)
    if is_text:
        used: tuple[str, ...] = (text_field,)
        text = fields[text_field]
        if type(text) is not str or not text.isascii() or rendered or SUSPECT.match(text):
            text = _plain_text(text, f"{where}: {text_field}", rendered)
        record = Text(text)
    elif (
        kind == LABELLED
        and (isinstance(fields.get("rejected"), list) or not LABEL_FIELDS.isdisjoint(fields))
        and (labelled := find_labels(fields, where)) is not None
    ):
        used = USED_FIELDS[labelled[0]]
        record = _labelled(fields, *labelled, where, rendered, ignored)
    elif fields.get("chosen") is not None and fields.get("rejected") is not None:
        used = ("prompt", "chosen", "rejected", "system") if kind != LABELLED else USED_FIELDS["rejected"]
        chosen = _conversation(fields, "chosen", where, rendered, ignored)
        rejected = _conversation(fields, "rejected", where, rendered, ignored)
        if kind not in PAIRED:
            record = from_messages(chosen, kind, where)
        elif chosen[-1].get("train", True) and rejected[-1].get("train", True):
            record = Preference(chosen, rejected)
        else:
            raise UserError(f"{where}: expected two answers to learn from, got one with weight 0")
    elif kind not in PAIRED and fields.get("messages") is not None:
        used = ("messages", "system")
        check_good(fields, where)
        messages = _messages(fields, "messages", None, where, rendered, ignored)
        if fields.get("system") not in (None, ""):
            messages = conversions.with_system(fields["system"], messages, where)
        record = from_messages(messages, kind, where)
    elif kind not in PAIRED and fields.get("prompt") is not None and fields.get("completion") is not None:
        used = ("prompt", "completion", "label", "system")
        check_good(fields, where)
        record = from_messages(_conversation(fields, "completion", where, rendered, ignored), kind, where)
    elif kind == "conversation" and rendered and isinstance(fields.get(text_field), str):
        used = (text_field,)
        record = from_messages(parse(fields[text_field], f"{where}: {text_field}"), kind, where)
    else:
        expected = EXPECTED_FIELDS[kind]
        if kind == "text":
            expected = expected.replace("text", text_field, 1)
        raise UserError(f"{where}: expected a {kind}: {expected}; got the fields {shown_fields(fields)}")
    if tools:
        record = _with_tools(record, tools, where)
    if ignored is not None:
        for name, value in fields.items():
            if name not in used and value is not None and name != "tools":
                ignored.add(name)
    return record


def shown_fields(fields: Mapping[str, Any]) -> str:
    """Return the names of a row's fields for a message."""
    return shown_names(key if value is not None else f"{key} (null)" for key, value in fields.items())


def parse_prompt(
    fields: Mapping[str, Any], where: str, rendered: bool = False, ignored: set[str] | None = None
) -> list[Message]:
    """Return the messages to answer of a row: ``prompt`` (text or messages) or ``messages``, with ``system``.

    Args:
        fields, where, rendered: see :func:`parse_record`.
        ignored: unknown fields with a value are added to it, but not those of an answer.

    Raises UserError if it has none or both of them, or if they are malformed or end with an assistant's message.
    """
    row = conversions.own_fields(fields, where)
    given = [name for name in ("prompt", "messages") if row.get(name) is not None]
    if len(given) != 1:
        raise UserError(f"{where}: expected prompt or messages, got the fields {shown_fields(fields)}")
    messages = _messages(row, given[0], "user" if given[0] == "prompt" else None, where, rendered, ignored)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: expected a message to answer at the end, got the assistant's own")
    if row.get("system") not in (None, ""):
        messages = conversions.with_system(row["system"], messages, where)
    if ignored is not None:
        ignored.update(name for name in row.keys() - set(conversions.FIELDS) if row[name] is not None)
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _with_tools(record: Record, tools: list[Any], where: str) -> Record:
    """Return a record with definitions of tools, which the first message of each conversation has."""

    def defined(messages: list[Message]) -> list[Message]:
        return [{**messages[0], "tools": tools}, *messages[1:]]

    if isinstance(record, Text):
        raise UserError(f"{where}: tools: expected none in a text")
    if isinstance(record, Preference):
        return Preference(defined(record.chosen), defined(record.rejected))
    if isinstance(record, Labelled):
        return Labelled([defined(messages) for messages in record.answers], record.labels)
    return Conversation(defined(record.messages))


def answer_form(fields: Mapping[str, Any]) -> str | None:
    """Return the form of the answers in a row with our fields, "preference" or "conversation"; None if it has none."""
    given = {name for name, value in fields.items() if value is not None}
    is_conversation = "messages" in given or {"prompt", "completion"} <= given
    if {"chosen", "rejected"} <= given or (not is_conversation and not given.isdisjoint(("chosen", "rejected"))):
        return "preference"
    return "conversation" if is_conversation else None


def from_messages(messages: list[Message], kind: str, where: str) -> Record:
    """Return messages as a conversation, or joined as text.

    Raises UserError for a conversation without an answer to learn, and for a text with a turn that is not learnt.
    """
    excluded = False
    if kind == "text":
        for message in messages:
            excluded = excluded or not message.get("train", True)
            if "tool_calls" in message:
                raise UserError(f"{where}: tool_calls: expected none in messages that become a text")
        if excluded:
            raise UserError(f"{where}: expected messages that are all learnt as text, got one with weight 0")
        return Text(chat.text(messages))
    chat.check_answered(messages, where)
    for message in messages:
        if message["role"] == "assistant" and message.get("train", True):
            return Conversation(messages)
    raise UserError(f"{where}: expected an answer to learn, got weight 0 for each")


def _plain_text(text: Any, where: str, is_rendered: bool) -> str:
    """Return a text to learn; the contents of a rendered conversation."""
    check_text(text, where)
    if is_rendered:
        return chat.text(parse(text, where))
    if SUSPECT.match(text):
        refuse(text, where)
    return text


def _messages(
    fields: Mapping[str, Any],
    name: str,
    role: str | None,
    where: str,
    rendered: bool,
    ignored: set[str] | None,
) -> list[Message]:
    """Return the messages of a field; plain text becomes one message of ``role`` unless that is None."""
    value = fields[name]
    if type(value) is str and value.isascii() and role is not None and not rendered and not SUSPECT.match(value):
        return [{"role": role, "content": value}]
    if type(value) is list and value:
        messages, is_ascii = [], True  # ASCII text, the common case, has no lone surrogate
        for message in value:
            if type(message) is not dict or len(message) != 2 or message.get("role") not in chat.ROLES:
                break
            content = message.get("content")
            if type(content) is not str:
                break
            is_ascii = is_ascii and content.isascii()
            messages.append({"role": message["role"], "content": content})
        else:
            if not is_ascii:
                chat.check(messages, f"{where}: {name}")
            return messages
    where = f"{where}: {name}"
    if isinstance(value, str) and (rendered or SUSPECT.match(value)):
        value = _from_markup(value, where, rendered, name)
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    elif role is not None and not isinstance(value, list | Mapping):
        raise UserError(f"{where}: expected text or a list of messages, got {shown(value)}")
    if isinstance(value, Mapping) and role == "assistant":  # a side that is one message
        value = [value]
    if isinstance(value, list):
        messages = []
        for i, message in enumerate(value):
            messages.append(conversions.turn(message, f"{where}[{i}]", ignored, with_tools=True))
        value = messages
    chat.check(value, where)
    return value


def _from_markup(text: str, where: str, rendered: bool, name: str) -> str | list[Any]:
    """Return a text that may be JSON of messages or, with ``rendered``, a conversation in markup, as messages."""
    messages = conversions.from_json(text, where)
    if messages is not None:
        return messages
    if rendered:
        return parse(text, where, prompt=name == "prompt")
    refuse(text, where)
    return text


def _conversation(
    fields: Mapping[str, Any], name: str, where: str, rendered: bool, ignored: set[str] | None
) -> list[Message]:
    """Return the whole conversation of an answer: the side ``name`` of a preference, a completion, or messages.

    The prompt is a field of its own, or repeated at the beginning of the side, or only there.
    """
    side, prompt_field, prompt = fields[name], fields.get("prompt"), []
    if prompt_field not in (None, "", []) or (name in ("completion", "completions") and prompt_field == ""):
        if rendered and isinstance(side, str) and isinstance(prompt_field, str) and recognise(side) is None:
            # The answer continues the text of the prompt, up to the mark that ends the turn.
            fields = {**fields, name: prompt_field + side}
        else:
            prompt = _messages(fields, "prompt", "user", where, rendered, ignored)
    elif isinstance(side, str):
        side_format = recognise(side)
        if side_format is not None and side_format.name == "HH":
            rendered = True  # HH's own files have no other fields
        elif not rendered and conversions.from_json(side, where) is None:
            raise UserError(f"{where}: {name}: expected a prompt with an answer in plain text, got none")
    if fields.get("system") not in (None, ""):
        prompt = conversions.with_system(fields["system"], prompt, where)
    messages = _messages(fields, name, "assistant", where, rendered, ignored)
    last_role = messages[-1]["role"]
    if last_role != "assistant":
        raise UserError(f"{where}: {name}: expected the assistant's answer at the end, got a {last_role} message")
    if prompt and prompt[-1]["role"] == "user" and messages[0]["role"] == "assistant":  # the common case
        return prompt + messages
    return conversions.joined(prompt, messages, f"{where}: {name}")


def _labelled(
    fields: Mapping[str, Any],
    name: str,
    answers: Sequence[Any],
    labels: tuple[Label, ...],
    where: str,
    rendered: bool,
    ignored: set[str] | None,
) -> Labelled:
    """Return the record of what ``find_labels`` returned: answers in the field ``name``, and their labels."""
    conversations = []
    if name == "rejected":
        conversations.append(_conversation(fields, "chosen", where, rendered, ignored))
    for answer in answers:
        row = {**fields, name: answer}
        if name == "messages":  # which have the prompt
            row["prompt"] = None
        conversations.append(_conversation(row, name, where, rendered, ignored))
    for messages in conversations:
        if not messages[-1].get("train", True):
            raise UserError(f"{where}: expected answers to learn from, got one with weight 0")
    return Labelled(conversations, labels)


def split_text(text: str) -> list[Text]:
    """Split a text after lines, else after spaces, into the longest records of at most ``MAX_TEXT`` characters.

    Only the last record teaches the end of the document.
    """
    records, start = [], 0
    while len(text) - start > MAX_TEXT:
        limit = start + MAX_TEXT
        end = limit
        for separator in ("\n", " "):
            position = text.rfind(separator, start, limit)
            if position > start:
                end = position + 1
                break
        records.append(Text(text[start:end], continues=True))
        start = end
    return [*records, Text(text[start:])]


# Sequences of records


class Records(Sequence):
    """Base class of sized and indexable sequences of records.

    Worker processes unpickle them, so that they hold plain attributes rather than closures.
    """

    def __iter__(self) -> Iterator[Record | None]:
        """Iterate over all records; an IndexError raised in making one does not end the iteration silently."""
        for index in range(len(self)):
            yield self[index]

    @abstractmethod
    def location(self, index: int) -> str:
        """Return FILE:LINE of a record or the like, for messages."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short digest of the content that the records are made from, not of its path and dates."""


class RowRecords(Records):
    """Records of rows; a text longer than ``MAX_TEXT`` characters is several records.

    Every row is checked at once: a malformed row is an error now rather than hours into training.

    Args:
        open_rows: returns the rows after a visit to each (``dph.data.files.open_rows``).
        row_format: of the rows.
    """

    def __init__(self, open_rows: Callable[[Visit], JsonLines | Documents], row_format: RowFormat) -> None:
        self._format, self._kind, self._options = row_format, row_format.kind, row_format.options
        self._pieces: dict[int, list[Text]] = {}  # of rows with a long text
        records_per_row = array("q")
        self._rows = open_rows(partial(self._checker, records_per_row))
        self._size = sum(records_per_row)
        has_one_each = not self._pieces and self._size == len(records_per_row)
        self._ends = array("q", () if has_one_each else accumulate(records_per_row))  # of each row's records

    def _checker(self, records_per_row: array, place: str) -> Callable[[int, Mapping[str, Any]], None]:
        """Return a function that checks a row, given its number, and appends the number of its records."""
        kind, options, ignored, pieces = self._kind, self._options, self._format.ignored, self._pieces
        has_filter = bool(self._format.filter)

        def check(number: int, fields: Mapping[str, Any]) -> None:
            if has_filter and not self._format.accepts(fields):
                records_per_row.append(0)
                return
            record, count = parse_record(fields, kind, f"{place}{number}", *options, ignored), 1
            if type(record) is Text and len(parts := split_text(record.text)) > 1:
                pieces[len(records_per_row)], count = parts, len(parts)
            records_per_row.append(count)

        return check

    def __len__(self) -> int:
        """Number of records."""
        return self._size

    def __getitem__(self, index: int) -> Record:
        """Return one record."""
        row = index = range(self._size)[index]
        if self._ends:
            row = bisect_right(self._ends, index)
            if row in self._pieces:
                return self._pieces[row][index - self._ends[row]]  # counted from the end of its pieces
        return parse_record(self._rows.visited(row), self._kind, self._rows.location(row), *self._options)

    def location(self, index: int) -> str:
        """Return FILE:LINE of a record."""
        index = range(self._size)[index]
        return self._rows.location(bisect_right(self._ends, index) if self._ends else index)

    def fingerprint(self) -> str:
        """Return a digest of the rows, and of the options that select and rename."""
        return self._format.fingerprint(self._rows.fingerprint())


class Encoder:
    """Callable from records to tokens; a Preference gives (chosen, rejected), masked to their final answers.

    A Labelled gives its answers alike, with their labels.

    Args:
        tokenizer: of the tokens.
        loss: tokens of a conversation that its loss mask counts: "answers", or "all" but the first and those of answers
            that are not trained.

    Raises UserError for a tokenizer without an EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: str = "answers") -> None:
        self.tokenizer, self.loss = tokenizer, loss
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
            return self.joined([record])
        tokens = self._encode_text(record.text)
        mask = [True] * len(tokens) + [not record.continues]
        return Encoded([self._eos, *tokens], [*tokens, self._eos], mask, mask, None)

    def joined(self, records: Sequence[Conversation]) -> Encoded:
        """Return the tokens of conversations as one, with the system messages of the first alone.

        Raises UserError for a record of another kind.
        """
        conversations = []
        for record in records:
            if not isinstance(record, Conversation):
                raise UserError(f"data.repeat_system: expected conversations to join, got {type(record).__name__}")
            conversations.append(record.messages)
        encoded = chat.encode_many(conversations, self.tokenizer, repeat_system=False)
        if self.loss == "answers":
            return encoded
        mask = [True] * (len(encoded) - 1) + [False]
        if not all(message.get("train", True) for messages in conversations for message in messages):
            trained = []
            for messages in conversations:
                trained.append([{key: message[key] for key in message if key != "train"} for message in messages])
            answers = chat.encode_many(trained, self.tokenizer, repeat_system=False).loss_mask
            for i, (answer, learnt) in enumerate(zip(answers, encoded.loss_mask, strict=True)):
                mask[i] = mask[i] and (learnt or not answer)
        return replace(encoded, loss_mask=mask)
