"""Conversations that were rendered to one text by a chat format, recognised and parsed back into messages.

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi<|im_end|>\\n           ChatML
    <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|>...                       Llama 3
    <s>[INST] <<SYS>>\\nBe brief.\\n<</SYS>>\\n\\nHello [/INST] Hi </s>                     Llama 2, Mistral
    <|user|>\\nHello</s>\\n<|assistant|>\\nHi</s>                                          Zephyr, Phi-3
    <start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\nHi<end_of_turn>      Gemma
    \\n\\nHuman: Hello\\n\\nAssistant: Hi                                                  HH (Anthropic)

A text is recognised by its beginning: one that merely mentions such markup stays text. Other formats are recognised
but not parsed: Alpaca, Vicuna, and those with a control token for a role (DeepSeek, Command R, gpt-oss, ...).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dph.errors import UserError, shown

if TYPE_CHECKING:
    from dph.chat import Message

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "model": "assistant",
    "Human": "user", "Assistant": "assistant", "[INST]": "user", "[/INST]": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """Regular expressions of one chat format: the start of a text, the head of a turn (its group: role), its end.

    ``end`` is None if turns end at the next head. ``strip`` removes whitespace around contents, which is the format's.
    """

    name: str
    start: re.Pattern[str]
    head: re.Pattern[str]
    end: re.Pattern[str] | None
    strip: bool = True


def _format(name: str, head: str, end: str | None, start: str | None = None, strip: bool = True) -> Format:
    beginning = re.compile(rf"{BEFORE}(?:{start or head})")
    return Format(name, beginning, re.compile(head), None if end is None else re.compile(end), strip)


BEFORE = r"\s*(?:(?:<s>|</s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>)\s*)*"  # document tokens before the first turn
AFTER = re.compile(r"\s*(?:(?:<s>|</s>|<eos>|<\|end_of_text\|>|<\|endoftext\|>)\s*)*")
NOTHING_BEFORE = re.compile(BEFORE)
FORMATS = (
    _format("ChatML", r"<\|im_start\|>([a-z_]+)\n", r"<\|im_end\|>", strip=False),
    _format("Llama 3", r"<\|start_header_id\|>([a-z_]+)<\|end_header_id\|>", r"<\|eot_id\|>|<\|eom_id\|>"),
    _format("Llama 2", r"(\[/?INST\])", None, start=r"(?s:\[INST\].*\[/INST\])"),
    _format("Zephyr", r"<\|(system|user|assistant)\|>\n", r"</s>|<\|end\|>|<\|endoftext\|>"),
    _format("Gemma", r"<start_of_turn>(user|model)\n", r"<end_of_turn>"),
    # A text that begins with "Human:" may be the transcript of a novel; with an answer it is not.
    _format(
        "HH",
        r"(?:^\s*|\n\n)(Human|Assistant):",
        None,
        start=r"(?:(?<=\n\n)(?:Human|Assistant):|(?s:Human:.*\n\nAssistant:))",
    ),
)
# Formats that are recognised only.
OTHERS = {
    "Alpaca": re.compile(
        r"\s*(?:Below is an instruction[^\n]*\n+)?### (?:Instruction|Human):(?s:.*)### (?:Response|Assistant):"
    ),
    "Vicuna": re.compile(r"\s*(?:A chat between [^\n]*?)?USER:(?s:.*)ASSISTANT:"),
    "control tokens": re.compile(
        rf"{BEFORE}(?:<｜begin▁of▁sentence｜>|<｜User｜>|\[gMASK\]<sop>|(?:<BOS_TOKEN>)?<\|START_OF_TURN_TOKEN\|>"
        r"|<\|(?:start|start_of_role|header_start)\|>(?:user|system|developer)<\|)"
    ),
}  # fmt: skip
SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.S)
# The first characters of all texts that begin as one of the formats, and of JSON lists: a quick test.
SUSPECT = re.compile(r"\s*(?:<|\[|###|Human:|Assistant:|USER:|A chat between|Below is an instruction)")


def recognise(text: str) -> Format | None:
    """Return the format that a text begins with; None for plain text."""
    for chat_format in FORMATS:
        if chat_format.start.match(text):
            return chat_format
    return None


def refuse(text: str, where: str) -> None:
    """Raise UserError if a text is a rendered conversation: its markup would be trained as characters."""
    for name, pattern in OTHERS.items():
        if pattern.match(text) and recognise(text) is None:
            raise UserError(
                f"{where}: expected plain text or messages, got a rendered conversation ({name}, which is not parsed): "
                f"{shown(text[:60])}"
            )
    chat_format = recognise(text)
    if chat_format is not None:
        raise UserError(
            f"{where}: expected plain text or messages, got a rendered conversation ({chat_format.name}): "
            f"{shown(text[:60])}; format: rendered in the source parses it into messages"
        )


def parse(text: str, where: str, prompt: bool = False) -> list[Message]:
    """Return the messages of a rendered conversation.

    The last turn may lack its end. With ``prompt`` the head of an answer at the end is dropped.

    Raises UserError if the text is none, has text outside of turns, or a role other than user, assistant and system.
    """
    chat_format = recognise(text)
    if chat_format is None:
        names = ", ".join(known.name for known in FORMATS)
        raise UserError(f"{where}: expected a rendered conversation ({names}), got {shown(text[:60])}")
    before, *parts = chat_format.head.split(text)
    if not NOTHING_BEFORE.fullmatch(before):
        raise UserError(f"{where}: expected {chat_format.name} turns, got text before the first: {shown(before)}")
    messages: list[Message] = []
    for i in range(0, len(parts), 2):
        turn, is_last = f"{where}: turn {i // 2} ({chat_format.name})", i + 2 == len(parts)
        if parts[i] not in ROLES:
            raise UserError(f"{turn}: expected role user, assistant or system, got {shown(parts[i])}")
        role, content = ROLES[parts[i]], parts[i + 1]
        if chat_format.name == "Llama 2" and parts[i] != ("[INST]", "[/INST]")[i // 2 % 2]:
            raise UserError(f"{turn}: expected [INST] and [/INST] in turns, got {parts[i]}")
        has_end = False
        if chat_format.end is None:
            content = _without_document_tokens(content)
        else:
            end = chat_format.end.search(content)
            has_end = end is not None
            if end is None and not is_last:
                raise UserError(f"{turn}: expected {chat_format.end.pattern} at its end, got none")
            if end is not None:
                after = content[end.end() :]
                if not AFTER.fullmatch(after):
                    raise UserError(f"{turn}: expected nothing between turns, got {shown(after)}")
                content = content[: end.start()]
        if prompt and is_last and role == "assistant" and not has_end and not content.strip():
            break
        if chat_format.name == "Llama 2" and role == "user":
            system = SYSTEM.match(content)
            if system is not None:
                messages.append({"role": "system", "content": system[1].strip()})
                content = content[system.end() :]
        messages.append({"role": role, "content": content.strip() if chat_format.strip else content})
    return messages


def _without_document_tokens(content: str) -> str:
    """Return the content of a turn without the tokens at its end that separate documents."""
    while True:
        content = content.rstrip()
        shorter = content.removesuffix("<s>").removesuffix("</s>").removesuffix("<|endoftext|>")
        if shorter == content:
            return content
        content = shorter
