"""Tokenizers: training of a byte-level BPE, and the two chat tokens for an existing tokenizer.

| token | id | use |
|---|---|---|
| ``</s>`` | 0 | BOS and EOS: before the first message, between documents |
| ``<pad>`` | 1 | filler |
| ``<|im_start|>`` | 2 | opens a message |
| ``<|im_end|>`` | 3 | closes it; its hidden state gives the reward |

There is no unknown token: every text is a sequence of bytes. No merge crosses the bounds of a line that is a role's
name, or of a spelled special token, so that the chat template saved with the tokenizer (``dph.chat.TEMPLATE``) gives
the tokens of ``dph.chat``, which encodes head and content separately.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.chat import END, ROLES, START, TEMPLATE
from dph.data.conversions import from_json
from dph.data.files import is_text, open_rows, read_text
from dph.data.folders import files_in
from dph.data.rendered import SUSPECT, parse, recognise, refuse
from dph.errors import UserError, check_text, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "</s>", "<pad>"
SPECIAL_TOKENS = (EOS, PAD, START, END)
# Fields of rows that hold text: ours and other programs' (dph.data.conversions).
FIELDS = (
    "text", "messages", "prompt", "completion", "completions", "chosen", "rejected", "system", "conversations",
    "conversation", "instruction", "input", "output", "preferred_output", "non_preferred_output",
)  # fmt: skip
CONTENTS = ("content", "text", "value", "messages")  # fields with the text of a message, of its parts, or of a request
MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, and the special tokens
MAX_VOCABULARY = 2**24  # as dph.ModelConfig allows, far above any known tokenizer


def train(
    files: Sequence[str | Path], vocab_size: int, out: str | Path | None = None, fields: Sequence[str] = FIELDS
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts of files and folders, as ``read_texts`` returns them.

    ``vocab_size`` is an upper bound, special tokens included; a small corpus gives fewer. If ``out`` is given, the
    tokenizer is saved to this folder for ``AutoTokenizer.from_pretrained``.

    Raises UserError as ``read_texts``, and if there is no text.
    """
    if not files:
        raise UserError("files: expected at least one file, got none")
    texts = itertools.chain.from_iterable(read_texts(path, fields) for path in files)
    return _train(texts, vocab_size, out, ", ".join(map(str, files)))


def from_iterator(texts: Iterable[str], vocab_size: int, out: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts in memory; otherwise as ``train``."""
    return _train(texts, vocab_size, out, "texts")


def _train(texts: Iterable[str], vocab_size: int, out: str | Path | None, where: str) -> PreTrainedTokenizerFast:
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out}: expected a folder to save the tokenizer to, got a file")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise UserError(f"vocab_size: expected a whole number, got {shown(vocab_size)}")
    if vocab_size > MAX_VOCABULARY:
        raise UserError(
            f"vocab_size: expected at most {MAX_VOCABULARY} (no known tokenizer has more), got {shown(vocab_size)}"
        )
    if vocab_size < MIN_VOCABULARY:
        smallest = f"{MIN_VOCABULARY} (256 bytes, {len(SPECIAL_TOKENS)} tokens)"
        raise UserError(f"vocab_size: expected at least {smallest}, got {vocab_size}")

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    spelled = "|".join(map(re.escape, SPECIAL_TOKENS))
    role_line = rf"(?<![^\n])(?:{'|'.join(ROLES)})\n"  # of a head, or in a text
    # The pattern of ByteLevel splits letters from punctuation, so that no merge can spell a special token.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(spelled), "isolated"),
            pre_tokenizers.Split(Regex(role_line), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(texts, where), trainer)

    from transformers import PreTrainedTokenizerFast  # slow, so after the errors of the files

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
    if out is not None:
        tokenizer.save_pretrained(out)
    return tokenizer


def add_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Add ``<|im_start|>`` and ``<|im_end|>`` as special tokens if they are missing, in place; return their ids.

    Their ids are the first that are free: 50265 and 50266 of OPT's 50272. A tokenizer without a chat template gets
    ``dph.chat.TEMPLATE``.
    """
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (START, END)], special_tokens=True)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    return tuple(tokenizer.convert_tokens_to_ids([START, END]))


def _not_empty(texts: Iterable[str], where: str) -> Iterator[str]:
    """Yield the texts that are not empty. Raises UserError if there are none."""
    any_text = False
    for text in texts:
        check_text(text, where)
        if text:
            any_text = True
            yield text
    if not any_text:
        raise UserError(f"{where}: expected text to train on, got none")


def read_texts(path: str | Path, fields: Sequence[str] = FIELDS) -> Iterator[str]:
    """Yield the texts of a file or folder: the lines of a text file, the texts and messages in ``fields`` of rows.

    Raises UserError if a file is missing, malformed or of a kind that is not read, and as ``texts_of``.
    """
    path = Path(path)
    for file in files_in(path) if path.is_dir() else [path]:
        if is_text(file):
            text = read_text(file)
            refuse(text, str(file))
            yield from text.splitlines(keepends=True)
            continue
        rows = open_rows(file)
        for i, row in enumerate(rows):
            yield from texts_of(row, fields, rows.location(i))


def texts_of(row: Mapping[str, Any], fields: Sequence[str], where: str, rendered: bool = False) -> Iterator[str]:
    """Yield the texts in ``fields`` of a row, with ``rendered`` the contents of conversations in markup.

    Raises UserError, which begins with ``where``, if the row has none of the fields, and for markup otherwise.
    """
    present = [name for name in fields if row.get(name) is not None]
    if not present:
        raise UserError(
            f"{where}: expected a text in {', '.join(fields)}, got the fields {shown_names(row)}; --field NAME reads "
            "others"
        )
    for name in present:
        for text in _strings(row[name], f"{where}: {name}"):
            check_text(text, where)
            if rendered and recognise(text) is not None:
                for message in parse(text, f"{where}: {name}", prompt=True):
                    yield message["content"]
                continue
            if SUSPECT.match(text):
                refuse(text, f"{where}: {name}")
            yield text


def _strings(value: Any, where: str) -> Iterator[str]:
    """Yield the texts of a field: a text, messages or parts of one with their content, or a list or JSON of these."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            messages = from_json(value, where)
            if messages is None:
                yield value
            else:
                waiting.append(messages)
            continue
        if isinstance(value, Mapping):
            contents = [value[name] for name in CONTENTS if name in value]
            value = contents or value
        if isinstance(value, list):
            waiting += reversed(value)
        elif value is not None:
            raise UserError(f"{where}: expected text, or messages with a content, got {shown(value)}")
