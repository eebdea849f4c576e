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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.chat import END, ROLES, START, TEMPLATE
from dph.data.sources import JsonLines, read_text
from dph.errors import UserError, check_text, shown, shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "</s>", "<pad>"
SPECIAL_TOKENS = (EOS, PAD, START, END)
FIELDS = ("text", "messages", "prompt", "completion", "completions", "chosen", "rejected")  # of rows, that hold text
MIN_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, and the special tokens
MAX_VOCABULARY = 2**24  # as dph.ModelConfig allows, far above any known tokenizer


def train(
    files: Sequence[str | Path], vocab_size: int, out: str | Path | None = None, fields: Sequence[str] = FIELDS
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on .txt and .jsonl files; of a .jsonl row, on the texts and messages in ``fields``.

    ``vocab_size`` is an upper bound, special tokens included; a small corpus gives fewer. If ``out`` is given, the
    tokenizer is saved to this folder for ``AutoTokenizer.from_pretrained``.

    Raises UserError if a file is missing, malformed or of another kind, if a row has none of the fields, or if there is
    no text.
    """
    if not files:
        raise UserError("files: expected at least one .txt or .jsonl file, got none")
    texts = itertools.chain.from_iterable(_read_texts(Path(path), fields) for path in files)
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


def _read_texts(path: Path, fields: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a text file, or the texts in ``fields`` of the rows of a JSONL file."""
    if path.suffix == ".txt":
        yield from read_text(path).splitlines(keepends=True)
    elif path.suffix == ".jsonl":
        lines = JsonLines(path)
        for i, row in enumerate(lines):
            present = [name for name in fields if row.get(name) is not None]
            if not present:
                raise UserError(
                    f"{lines.location(i)}: expected a text in {', '.join(fields)}, got the fields {shown_names(row)}; "
                    "--field NAME reads others"
                )
            for name in present:
                for text in _strings(row[name], f"{lines.location(i)}: {name}"):
                    check_text(text, lines.location(i))
                    yield text
    else:
        raise UserError(f"{path}: expected a .txt or .jsonl file, got {path.suffix or 'no suffix'}")


def _strings(value: Any, where: str) -> Iterator[str]:
    """Yield the texts of a field: a text, messages or parts of a message with their content, or a list of these."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict) and ("content" in value or "text" in value):
            waiting.append(value.get("content", value.get("text")))
        elif value is not None:
            raise UserError(f"{where}: expected text, or messages with a content, got {shown(value)}")
