"""Conversations as tokens (ChatML): masks for training and scoring, and the place where the reward is read.

    </s><|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi<|im_end|>\\n

Head, content and tail of a message are tokenised apart, and content with its special tokens split, so that text which
spells ``<|im_end|>`` or ``</s>`` stays text: a control token comes from this file's markup and from nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakKeyDictionary, proxy

from dph.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens [T] with their targets and masks, all lists of one length.

    Position i of a mask speaks of ``targets[i]``, which the model predicts from ``tokens[: i + 1]``.
    """

    tokens: list[int]
    targets: list[int]  # the tokens shifted by one, and EOS at the end
    loss_mask: list[bool]  # assistant content and the <|im_end|> after it
    score_mask: list[bool]  # assistant content only
    # Where tokens hold the <|im_end|> of the final assistant message; None where the answer was cut off.
    reward_position: int | None

    def __len__(self) -> int:
        """How many tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Markup:
    """How one tokenizer writes the constant segments, and content."""

    size: int  # of the vocabulary that this was made with
    eos: int
    end: int
    heads: dict[str, list[int]]  # role -> "<|im_start|>ROLE\n"
    tail: list[int]  # "<|im_end|>\n"
    content: Callable[[str], list[int]]


# Weak keys, so that neither a dead tokenizer nor another one at its address is ever found here.
_markups: WeakKeyDictionary[PreTrainedTokenizerBase, Markup] = WeakKeyDictionary()


def markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """The constant segments of ``tokenizer``, made once. UserError where it cannot hold a conversation."""
    marks = _markups.get(tokenizer)
    if marks is None or marks.size != len(tokenizer):
        marks = _markups[tokenizer] = _make_markup(tokenizer)
    return marks


def _make_markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in (START, END) if token not in vocabulary]:
        raise UserError(
            f"tokenizer: expected the chat tokens {START} and {END}, got one without {' and '.join(absent)}; "
            "dph.data.tokenizer.add_chat_tokens adds them"
        )
    start, end, content = vocabulary[START], vocabulary[END], plain(tokenizer)
    control = {start, end, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if leaked := control.intersection(content(START + END + "".join(tokenizer.all_special_tokens))):
        names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(leaked)))
        raise UserError(f"tokenizer: text that spells {names} becomes a control token; add it as a special token")
    heads = {role: _marker_tokens(f"{START}{role}\n", start, tokenizer) for role in ROLES}
    tail = _marker_tokens(f"{END}\n", end, tokenizer)
    return Markup(len(tokenizer), eos_token(tokenizer), end, heads, tail, content)


def _marker_tokens(text: str, control: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    if ids[0] != control or control in ids[1:]:
        raise UserError(f"tokenizer: expected {text!r} to begin with the one control token {control}, got {ids}")
    return ids


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS, which also stands before the first message and between documents."""
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected one with an EOS token, got one without")
    return tokenizer.eos_token_id


def plain(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """A function from text to tokens that gives no control token, whatever the text spells."""
    if not tokenizer.is_fast:
        slow = proxy(tokenizer)  # the function is kept by _markups, which must not keep the tokenizer
        return lambda text: slow(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # A copy of our own: six times faster than calling the wrapper, and the switch below is state of the backend, which
    # another thread's call with other settings would turn off between our setting it and our use of it.
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def check(messages: Any, where: str = "messages") -> None:
    """Raise UserError, naming the message, unless ``messages`` is a list of messages with role and text content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"{where}: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise UserError(f"{where}: expected at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}[{i}]: expected an object with role and content, got {type(message).__name__}")
        if absent := [key for key in ("role", "content") if key not in message]:
            raise UserError(f"{where}[{i}]: expected role and content, got none for {' and '.join(absent)}")
        if message["role"] not in ROLES:
            raise UserError(f"{where}[{i}]: expected role {', '.join(ROLES)}, got {message['role']!r}")
        check_text(message["content"], f"{where}[{i}].content")


def check_text(text: Any, where: str) -> None:
    """Raise UserError unless ``text`` is a string that has a UTF-8 form."""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected valid Unicode, got a lone surrogate at character {error.start}") from None


def check_answered(messages: Sequence[Message], where: str = "messages") -> None:
    """Raise UserError where no message comes from the assistant: nothing to train on, nothing to score."""
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: expected an assistant message, got a conversation without one")


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool = False) -> Encoded:
    """Tokens, targets, masks and reward position of one conversation.

    ``last_only`` leaves the masks on for the final assistant message alone: the turns before it are part of the prompt.
    Raises UserError where a message is malformed, where none comes from the assistant, or where ``tokenizer`` lacks
    the chat tokens.
    """
    return encode_many([messages], tokenizer, last_only=last_only)


def encode_many(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    repeat_system: bool = True,
    last_only: bool = False,
) -> Encoded:
    """Conversations end to end after a single EOS; the reward position is the last one's.

    ``repeat_system=False`` drops the system messages after the first conversation. With ``last_only`` the conversations
    before the last are few-shot examples.
    """
    if not conversations:
        raise UserError("conversations: expected at least one, got none")
    for i, messages in enumerate(conversations):
        where = f"conversations[{i}]" if len(conversations) > 1 else "messages"
        check(messages, where)
        check_answered(messages, where)
    turns = [
        message
        for i, messages in enumerate(conversations)
        for message in messages
        if repeat_system or i == 0 or message["role"] != "system"
    ]
    return _join(turns, tokenizer, last_only)


def _join(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool) -> Encoded:
    marks = markup(tokenizer)
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=None)
    tokens, loss_mask, score_mask, reward_position = [marks.eos], [], [], None
    for i, message in enumerate(turns):
        head, content = marks.heads[message["role"]], marks.content(message["content"])
        tokens += head + content
        if i == last:
            reward_position = len(tokens)
        tokens += marks.tail
        on = i == last or (message["role"] == "assistant" and not last_only)
        before, after = [False] * len(head), [False] * (len(marks.tail) - 1)
        loss_mask += before + [on] * (len(content) + 1) + after
        score_mask += before + [on] * len(content) + [False] + after
    return Encoded(tokens, [*tokens[1:], marks.eos], [*loss_mask, False], [*score_mask, False], reward_position)


def prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens after which an answer begins: the conversation and ``<|im_start|>assistant\\n``."""
    check(messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"messages[{len(messages) - 1}]: expected a message to answer, got the assistant's own")
    return _join(messages, tokenizer, last_only=False).tokens + markup(tokenizer).heads["assistant"]


def continuation(
    prompt_tokens: Sequence[int], answer_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """A sampled answer after its ``prompt``, as ``encode`` gives the whole conversation.

    The answer is finished when its last token is ``<|im_end|>``; a cut-off one has reward position None. The masks
    cover the answer alone. Raises ValueError where ``<|im_end|>`` comes before the end of the answer.
    """
    marks, answer = markup(tokenizer), list(answer_tokens)
    if marks.end in answer[:-1]:
        at = answer.index(marks.end)
        raise ValueError(f"answer_tokens: expected {END} only as the last of {len(answer)}, got one at {at}")
    finished = answer[-1:] == [marks.end]
    after = marks.tail[1:] if finished else []
    tokens = [*prompt_tokens, *answer, *after]
    before, content = [False] * (len(prompt_tokens) - 1), len(answer) - finished
    loss_mask = before + [True] * len(answer) + [False] * (len(after) + 1)
    score_mask = before + [True] * content + [False] * (finished + len(after) + 1)
    reward_position = len(prompt_tokens) + content if finished else None
    return Encoded(tokens, [*tokens[1:], marks.eos], loss_mask, score_mask, reward_position)


def text(messages: Iterable[Message]) -> str:
    """The messages' contents as one text, a blank line between them."""
    return "\n\n".join(message["content"] for message in messages)
