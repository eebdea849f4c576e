"""Conversations as tokens, with the masks for training and scoring and the position of the reward.

A tokenizer with a chat template of its own gets that format (``dph.chat.templates``): for text that spells no control
token, the tokens of ``apply_chat_template``. Any other gets the paper's, which is ChatML after a single EOS:

    </s><|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi<|im_end|>\\n

In both, text that spells ``<|im_end|>`` or ``</s>`` stays text: control tokens come from the format only. In the
paper's, head, content and tail of a message are tokenised separately, and special tokens in content are split.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakKeyDictionary, proxy

from dph.chat.templates import Refused, Rendered, TemplateFormat
from dph.chat.tools import RenderedTools, ToolFormat, ToolsRefused, uses_tools
from dph.errors import UserError, check_text, one_line, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOOLS = "expected no tools in the paper's chat format; a tokenizer with a chat template of its own may have them"
START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
TOOL = "tool"  # role of the result of a call, in chat templates that have tools

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


class _Turn(TypedDict):
    role: str  # one of ROLES, or TOOL
    content: str


class Message(_Turn, total=False):
    """One turn of a conversation."""

    train: bool  # False leaves an answer out of the loss of ``encode``; it stays part of the conversation
    # For chat templates with tools, as ``apply_chat_template`` takes them: definitions for the whole conversation (at
    # one of its messages), the assistant's calls, and of a result the call and the name of the tool.
    tools: list[dict[str, Any]]
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens [T] with their targets and masks, all lists of one length.

    Position i of a mask belongs to ``targets[i]``, which the model predicts from ``tokens[: i + 1]``.
    """

    tokens: list[int]
    targets: list[int]  # the tokens shifted by one, and EOS at the end
    loss_mask: list[bool]  # assistant content up to the end-of-turn token after it
    score_mask: list[bool]  # assistant content only
    # Position of the end-of-turn token of the final assistant message in tokens; None for a cut-off answer.
    reward_position: int | None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Markup:
    """The paper's format: ids of the constant segments of a conversation, and the function that encodes content."""

    size: int  # of the tokenizer's vocabulary
    template: Any  # the tokenizer's chat template
    eos: int
    end_of_turn: int
    heads: dict[str, list[int]]  # role -> "<|im_start|>ROLE\n"
    tail: list[int]  # "<|im_end|>\n"
    content: Callable[[str], list[int]]


# Weak keys: no entry outlives its tokenizer, or serves another one at the same address.
_markups: WeakKeyDictionary[PreTrainedTokenizerBase, Markup | TemplateFormat] = WeakKeyDictionary()
_markups_lock = threading.Lock()  # tokenizers raise "Already borrowed" if two threads change their settings


def markup(tokenizer: PreTrainedTokenizerBase) -> Markup | TemplateFormat:
    """Return the chat format of ``tokenizer``, made once per tokenizer, vocabulary size and chat template.

    Both kinds have ``eos``, ``end_of_turn`` and ``tail``: the end-of-turn token and the constant tokens after it.

    Raises UserError if the tokenizer lacks EOS, if text can spell a control token, for the paper's format if it lacks
    the chat tokens, and for its own chat template if no control token ends the assistant's turn.
    """
    cached = _markups.get(tokenizer)
    if cached is not None and cached.size == len(tokenizer) and cached.template == tokenizer.chat_template:
        return cached
    with _markups_lock:
        cached = _markups.get(tokenizer)
        if cached is None or cached.size != len(tokenizer) or cached.template != tokenizer.chat_template:
            if own_template(tokenizer) is None:
                cached = _make_markup(tokenizer)
            else:
                with _user_errors(lambda index: tokenizer_name(tokenizer)):
                    cached = TemplateFormat(tokenizer, eos_token(tokenizer))
            _markups[tokenizer] = cached
        return cached


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's own chat template, None if it has none or ``TEMPLATE``: the paper's format."""
    if not tokenizer.chat_template or tokenizer.chat_template == TEMPLATE:
        return None
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise UserError(f"{tokenizer_name(tokenizer)}: {one_line(error, most=300)}") from error
    return None if template == TEMPLATE else template


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the end-of-turn token; None if the tokenizer has no chat format."""
    try:
        if own_template(tokenizer) is None:
            return tokenizer.get_vocab().get(END)
        return markup(tokenizer).end_of_turn
    except UserError:
        return None


@contextmanager
def _user_errors(name: Callable[[int | None], str]) -> Iterator[None]:
    """Turn the refusal of a tokenizer or conversation into a UserError; ``name`` gives a message's name."""
    try:
        yield
    except (Refused, ToolsRefused) as error:
        raise UserError(f"{name(error.index)}: {one_line(error, most=400)}") from error


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
    return Markup(len(tokenizer), tokenizer.chat_template, eos_token(tokenizer), end, segments, tail, content)


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
        role = message["role"]
        if not isinstance(role, str) or (role not in ROLES and role != TOOL):
            raise UserError(f"{where}[{i}]: expected role {', '.join((*ROLES, TOOL))}, got {shown(role)}")
        if len(message) > 2 and "tool_calls" in message:
            check_calls(message["tool_calls"], role, f"{where}[{i}].tool_calls")
        if not isinstance(message.get("train", True), bool):
            raise UserError(f"{where}[{i}].train: expected true or false, got {shown(message['train'])}")
        content = message["content"]
        if type(content) is not str or not content.isascii():  # ASCII text, the common case, has no lone surrogate
            check_text(content, f"{where}[{i}].content")


def check_calls(calls: Any, role: str, where: str) -> None:
    """Raise UserError unless ``calls`` are the assistant's, each with the name and arguments of a function."""
    if role != "assistant" or not isinstance(calls, list):
        raise UserError(f"{where}: expected a list of calls of the assistant, got {shown(calls)} of {role}")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments", {}), Mapping)
        ):
            raise UserError(f"{where}[{i}]: expected an object function with name and arguments, got {shown(call)}")


def check_answered(messages: Sequence[Message], where: str = "messages") -> None:
    """Raise UserError if no message comes from the assistant: nothing to train on, nothing to score."""
    for message in messages:
        if message["role"] == "assistant":
            return
    raise UserError(f"{where}: expected an assistant message, got a conversation without one")


def check_final_answer(messages: Sequence[Message], where: str = "messages") -> None:
    """Raise UserError unless the last message is the assistant's, which is the answer to judge."""
    last_role = messages[-1]["role"]
    if last_role != "assistant":
        raise UserError(f"{where}: expected the assistant's answer at the end, got a {last_role} message")


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, last_only: bool = False) -> Encoded:
    """Return tokens, targets, masks and reward position of one conversation.

    The masks cover the assistant's messages but those with ``train`` False, and with ``last_only`` only the final one:
    earlier turns are part of the prompt. Raises UserError for a malformed message, a conversation without an assistant
    message, a tokenizer without a chat format, and for a conversation or content that its chat template refuses or
    changes.
    """
    return encode_many([messages], tokenizer, last_only=last_only)


def encode_many(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    repeat_system: bool = True,
    last_only: bool = False,
) -> Encoded:
    """Return conversations end to end as one; the reward position is that of the last one.

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
        dropped: dict[str, Any] = {}  # definitions of tools that a dropped message has for its conversation
        for message in messages:
            if repeat_system or i == 0 or message["role"] != "system":
                if message["role"] == "assistant":
                    last_answer = len(turns)
                turns.append({**dropped, **message} if dropped else message)
            elif "tools" in message:
                dropped = {"tools": message["tools"]}
    marks = markup(tokenizer)
    if isinstance(marks, TemplateFormat):
        with _user_errors(lambda index: _turn_name(conversations, repeat_system, index)):
            return _encode_template(marks, turns, last_answer, last_only)
    tokens, loss_mask, score_mask, reward_position = [marks.eos], [], [], None
    for i, message in enumerate(turns):
        if message["role"] == TOOL or "tools" in message or "tool_calls" in message:
            raise UserError(f"{_turn_name(conversations, repeat_system, i)}: {NO_TOOLS}")
        head, content = marks.heads[message["role"]], marks.content(message["content"])
        tokens += head + content
        if i == last_answer:
            reward_position = len(tokens)
        tokens += marks.tail
        counted = i == last_answer if last_only else message["role"] == "assistant" and message.get("train", True)
        # targets are shifted: the head's last token predicts the content's first, and its last token the <|im_end|>
        before, after = [False] * len(head), [False] * (len(marks.tail) - 1)
        loss_mask += before + [counted] * (len(content) + 1) + after
        score_mask += before + [counted] * len(content) + [False] + after
    return Encoded(tokens, [*tokens[1:], marks.eos], [*loss_mask, False], [*score_mask, False], reward_position)


def _rendered(marks: TemplateFormat, turns: Sequence[Message], generate: bool = False) -> Rendered | RenderedTools:
    """Return the tokens of a conversation in a format of a chat template. Raises Refused or ToolsRefused."""
    if not uses_tools(turns):
        return marks.render(turns, generate)
    if marks.for_tools is None:
        marks.for_tools = ToolFormat(marks)
    return marks.for_tools.render(turns, generate)


def _encode_template(marks: TemplateFormat, turns: Sequence[Message], last_answer: int, last_only: bool) -> Encoded:
    """Return a conversation in a format of a chat template; otherwise as ``encode_many``. Raises Refused."""
    rendered = _rendered(marks, turns)
    tokens = rendered.tokens
    loss_mask, score_mask = [False] * len(tokens), [False] * len(tokens)
    for i, message in enumerate(turns):
        counted = i == last_answer if last_only else message["role"] == "assistant" and message.get("train", True)
        if not counted:
            continue
        if i not in rendered.ends:
            raise Refused("expected a chat template that ends this turn with its end-of-turn token, got another", i)
        begin, has_content = rendered.answer(i)
        for position, scored in enumerate([*has_content, False], begin):
            if position:  # no token predicts the first one
                loss_mask[position - 1], score_mask[position - 1] = True, scored
    return Encoded(tokens, [*tokens[1:], marks.eos], loss_mask, score_mask, rendered.ends[last_answer])


def _turn_name(conversations: Sequence[Sequence[Message]], repeat_system: bool, index: int | None) -> str:
    """Return the name of a turn of ``encode_many`` for error messages, or of all of them."""
    if index is None:
        return "conversations" if len(conversations) > 1 else "messages"
    names = []
    for i, messages in enumerate(conversations):
        where = f"conversations[{i}]" if len(conversations) > 1 else "messages"
        for k, message in enumerate(messages):
            if repeat_system or i == 0 or message["role"] != "system":
                names.append(f"{where}[{k}]")
    return names[index]


def prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before an answer: the conversation and the beginning of the assistant's turn.

    With a chat template of the tokenizer's own they need not be the first tokens of ``encode``: it may put something
    between the two (the empty ``<think>`` block of Qwen3), and merges may cross the border.
    """
    check(messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"messages[{len(messages) - 1}]: expected a message to answer, got the assistant's own")
    marks = markup(tokenizer)
    if isinstance(marks, TemplateFormat):
        with _user_errors(lambda index: "messages" if index is None else f"messages[{index}]"):
            return _rendered(marks, messages, generate=True).tokens
    if uses_tools(messages):
        raise UserError(f"messages: {NO_TOOLS}")
    tokens = [marks.eos]
    for message in messages:
        tokens += marks.heads[message["role"]] + marks.content(message["content"]) + marks.tail
    return tokens + marks.heads["assistant"]


def continuation(
    prompt_tokens: Sequence[int], answer_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Return a sampled answer after its ``prompt``, in the paper's format equal to ``encode`` of all of it.

    The answer is finished if its last token is the end-of-turn token, after which the constant tokens of the format
    are added; a cut-off answer has reward position None. The masks cover only the answer. Raises ValueError for an
    end-of-turn token before the end of the answer.
    """
    marks, answer = markup(tokenizer), list(answer_tokens)
    if marks.end_of_turn in answer[:-1]:
        position = answer.index(marks.end_of_turn)
        raise ValueError(
            f"answer_tokens: expected the end-of-turn token (id {marks.end_of_turn}) only as the last of "
            f"{len(answer)}, got one at {position}"
        )
    finished = answer[-1:] == [marks.end_of_turn]
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
