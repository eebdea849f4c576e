"""Conversations as tokens (ChatML), with the masks for training and scoring and the position of the reward.

    </s><|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi<|im_end|>\\n

Head, content and tail of a message are tokenised separately, and special tokens in content are split, so that a text
which spells ``<|im_end|>`` or ``</s>`` stays text: control tokens come from the markup of this module only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakKeyDictionary, proxy

from dph.errors import UserError, check_text, one_line, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")

# Chat template of our tokenizers: ``apply_chat_template(messages)`` gives the ``tokens`` of ``encode``, and with
# ``add_generation_prompt=True`` those of ``prompt``. Content that spells a control token needs
# ``sanitize_control_tokens=True``. A template renders one text, so the content after a head has to be tokenised as on
# its own: dph.data.tokenizer's tokenizers always do, another byte-level BPE if content does not begin with whitespace.
TEMPLATE = r"""
{%- if not eos_token -%}
    {{- raise_exception("tokenizer: expected one with an EOS token, got one without") -}}
{%- endif -%}
{{- eos_token -}}
{%- for message in messages -%}
    {%- set place = "messages[" ~ loop.index0 ~ "]" -%}
    {%- if message["role"] not in ["system", "user", "assistant"] -%}
        {{- raise_exception(place ~ ": expected role system, user, assistant, got '" ~ message["role"] ~ "'") -}}
    {%- endif -%}
    {%- if message["content"] is not string -%}
        {{- raise_exception(place ~ ".content: expected text") -}}
    {%- endif -%}
    {{- "<|im_start|>" + message["role"] + "\n" + message["content"] + "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages[-1]["role"] == "assistant" -%}
        {%- set place = "messages[" ~ (messages | length - 1) ~ "]" -%}
        {{- raise_exception(place ~ ": expected a message to answer, got the assistant's own") -}}
    {%- endif -%}
    {{- "<|im_start|>assistant\n" -}}
{%- endif -%}
"""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens [T] with their targets and masks, all lists of one length.

    Position i of a mask belongs to ``targets[i]``, which the model predicts from ``tokens[: i + 1]``.
    """

    tokens: list[int]
    targets: list[int]  # the tokens shifted by one, and EOS at the end
    loss_mask: list[bool]  # assistant content and the <|im_end|> after it
    score_mask: list[bool]  # assistant content only
    # Position of the <|im_end|> of the final assistant message in tokens; None for a cut-off answer.
    reward_position: int | None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Markup:
    """Token ids of the constant segments of a conversation, and the function that encodes content."""

    size: int  # of the tokenizer's vocabulary
    eos: int
    end: int
    heads: dict[str, list[int]]  # role -> "<|im_start|>ROLE\n"
    tail: list[int]  # "<|im_end|>\n"
    content: Callable[[str], list[int]]


# Weak keys: no entry outlives its tokenizer, or serves another one at the same address.
_markups: WeakKeyDictionary[PreTrainedTokenizerBase, Markup] = WeakKeyDictionary()
_markups_lock = threading.Lock()  # tokenizers raise "Already borrowed" if two threads change their settings


def markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return the markup of ``tokenizer``, made once per tokenizer and vocabulary size.

    Raises UserError if the tokenizer lacks the chat tokens or EOS, or if text can spell a control token.
    """
    cached = _markups.get(tokenizer)
    if cached is not None and cached.size == len(tokenizer):
        return cached
    with _markups_lock:
        cached = _markups.get(tokenizer)
        if cached is None or cached.size != len(tokenizer):
            cached = _markups[tokenizer] = _make_markup(tokenizer)
        return cached


def _make_markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return the markup of ``tokenizer``; raises UserError as ``markup``."""
    vocabulary = tokenizer.get_vocab()
    missing = []
    for token in (START, END):
        if token not in vocabulary:
            missing.append(token)
    if missing:
        raise UserError(
            f"{tokenizer_name(tokenizer)}: expected the chat tokens {START} and {END}, got one without "
            f"{' and '.join(missing)}; dph.data.tokenizer.add_chat_tokens adds them"
        )
    start, end, content = vocabulary[START], vocabulary[END], plain(tokenizer)
    control = {start, end, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if leaked := control.intersection(content(START + END + "".join(tokenizer.all_special_tokens))):
        names = shown_names(tokenizer.convert_ids_to_tokens(sorted(leaked)))
        raise UserError(
            f"{tokenizer_name(tokenizer)}: text that spells {names} becomes a control token; add it as a special token"
        )
    segments = {}
    for name in (*ROLES, "tail"):
        text, control_token = (f"{END}\n", end) if name == "tail" else (f"{START}{name}\n", start)
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        if ids[:1] != [control_token] or control_token in ids[1:]:
            raise UserError(
                f"{tokenizer_name(tokenizer)}: expected {text!r} to begin with the one control token {control_token}, "
                f"got {shown(ids)}"
            )
        segments[name] = ids
    tail = segments.pop("tail")
    return Markup(len(tokenizer), eos_token(tokenizer), end, segments, tail, content)


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of EOS, which also stands before the first message and between documents."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_name(tokenizer)}: expected one with an EOS token, got one without")
    return tokenizer.eos_token_id


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what error messages call a tokenizer: its folder or hub name, if it has one."""
    name = tokenizer.name_or_path
    return f"{name}: tokenizer" if name else "tokenizer"


def plain(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Return a function that encodes text without control tokens, even if the text spells one."""
    if not tokenizer.is_fast:
        slow = proxy(tokenizer)  # the function is kept by _markups, which must not keep the tokenizer
        return lambda text: slow(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # A copy of the backend: six times faster than the wrapper, and its encode_special_tokens cannot be changed by
    # another thread's call of the wrapper.
    try:
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers has no other kind
        name, got = tokenizer_name(tokenizer), one_line(error, most=300)
        raise UserError(f"{name}: expected parts that fit each other (two tokens of one id?), got: {got}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def check(messages: Any, where: str = "messages") -> None:
    """Raise UserError, naming the message, unless ``messages`` is a list of messages with role and text content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(f"{where}: expected a list of messages, got {shown(messages)}")
    if not messages:
        raise UserError(f"{where}: expected at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}[{i}]: expected an object with role and content, got {shown(message)}")
        if "role" not in message or "content" not in message:
            missing = " and ".join(key for key in ("role", "content") if key not in message)
            raise UserError(f"{where}[{i}]: expected role and content, got none for {missing}")
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise UserError(f"{where}[{i}]: expected role {', '.join(ROLES)}, got {shown(message['role'])}")
        content = message["content"]
        if type(content) is not str or not content.isascii():  # ASCII text, the common case, has no lone surrogate
            check_text(content, f"{where}[{i}].content")


def check_answered(messages: Sequence[Message], where: str = "messages") -> None:
    """Raise UserError if no message comes from the assistant: nothing to train on, nothing to score."""
    for message in messages:
        if message["role"] == "assistant":
            return
    raise UserError(f"{where}: expected an assistant message, got a conversation without one")


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool = False) -> Encoded:
    """Return tokens, targets, masks and reward position of one conversation.

    With ``last_only`` the masks cover only the final assistant message: earlier turns are part of the prompt. Raises
    UserError for a malformed message, a conversation without an assistant message, and a tokenizer without the chat
    tokens.
    """
    return encode_many([messages], tokenizer, last_only=last_only)


def encode_many(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    repeat_system: bool = True,
    last_only: bool = False,
) -> Encoded:
    """Return conversations end to end after a single EOS; the reward position is that of the last one.

    ``repeat_system=False`` drops the system messages after the first conversation. With ``last_only`` the conversations
    before the last are few-shot examples.
    """
    if not conversations:
        raise UserError("conversations: expected at least one, got none")
    turns, last_answer = [], None
    for i, messages in enumerate(conversations):
        where = f"conversations[{i}]" if len(conversations) > 1 else "messages"
        check(messages, where)
        check_answered(messages, where)
        for message in messages:
            if repeat_system or i == 0 or message["role"] != "system":
                if message["role"] == "assistant":
                    last_answer = len(turns)
                turns.append(message)
    marks = markup(tokenizer)
    tokens, loss_mask, score_mask, reward_position = [marks.eos], [], [], None
    for i, message in enumerate(turns):
        head, content = marks.heads[message["role"]], marks.content(message["content"])
        tokens += head + content
        if i == last_answer:
            reward_position = len(tokens)
        tokens += marks.tail
        counted = i == last_answer or (message["role"] == "assistant" and not last_only)
        # targets are shifted: the head's last token predicts the content's first, and its last token the <|im_end|>
        before, after = [False] * len(head), [False] * (len(marks.tail) - 1)
        loss_mask += before + [counted] * (len(content) + 1) + after
        score_mask += before + [counted] * len(content) + [False] + after
    return Encoded(tokens, [*tokens[1:], marks.eos], [*loss_mask, False], [*score_mask, False], reward_position)


def prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before an answer: the conversation and ``<|im_start|>assistant\\n``."""
    check(messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"messages[{len(messages) - 1}]: expected a message to answer, got the assistant's own")
    marks = markup(tokenizer)
    tokens = [marks.eos]
    for message in messages:
        tokens += marks.heads[message["role"]] + marks.content(message["content"]) + marks.tail
    return tokens + marks.heads["assistant"]


def continuation(
    prompt_tokens: Sequence[int], answer_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Return a sampled answer after its ``prompt``, equal to ``encode`` of the whole conversation.

    The answer is finished if its last token is ``<|im_end|>``; a cut-off answer has reward position None. The masks
    cover only the answer. Raises ValueError for ``<|im_end|>`` before the end of the answer.
    """
    marks, answer = markup(tokenizer), list(answer_tokens)
    if marks.end in answer[:-1]:
        position = answer.index(marks.end)
        raise ValueError(f"answer_tokens: expected {END} only as the last of {len(answer)}, got one at {position}")
    finished = answer[-1:] == [marks.end]
    after = marks.tail[1:] if finished else []
    tokens = [*prompt_tokens, *answer, *after]
    before, content = [False] * (len(prompt_tokens) - 1), len(answer) - finished
    loss_mask = before + [True] * len(answer) + [False] * (len(after) + 1)
    score_mask = before + [True] * content + [False] * (finished + len(after) + 1)
    reward_position = len(prompt_tokens) + content if finished else None
    return Encoded(tokens, [*tokens[1:], marks.eos], loss_mask, score_mask, reward_position)


def text(messages: Iterable[Message]) -> str:
    """Return the contents of messages as one text, with blank lines between them."""
    return "\n\n".join(message["content"] for message in messages)
