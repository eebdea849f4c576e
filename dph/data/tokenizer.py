"""Tokenizers: a byte-level BPE trained on the user's files, and the two chat tokens for one that exists.

| token | id | use |
|---|---|---|
| ``</s>`` | 0 | BOS and EOS: before the first message, between documents |
| ``<pad>`` | 1 | filler |
| ``<|im_start|>`` | 2 | opens a message |
| ``<|im_end|>`` | 3 | closes it; the reward is read here |

There is no unknown token: every text is bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.chat import END, START
from dph.data.sources import read_jsonl, read_text
from dph.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "</s>", "<pad>"
SPECIAL = (EOS, PAD, START, END)
SMALLEST = 256 + len(SPECIAL)  # every byte, and the special tokens


def train(files: Sequence[str | Path], vocab_size: int, out: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Train on .txt and .jsonl files; of the latter, all text but the messages' roles.

    ``vocab_size`` is an upper bound, special tokens included; a small corpus gives fewer. The tokenizer is saved to the
    folder ``out``, where one is given, for ``AutoTokenizer.from_pretrained``.

    Raises UserError where a file is missing, malformed or of another kind, or holds no text.
    """
    if not files:
        raise UserError("files: expected at least one .txt or .jsonl file, got none")
    texts = (text for path in files for text in _texts(Path(path)))
    return _train(texts, vocab_size, out, ", ".join(map(str, files)))


def from_iterator(texts: Iterable[str], vocab_size: int, out: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Train on texts in memory; otherwise as ``train``."""
    return _train(texts, vocab_size, out, "texts")


def _train(texts: Iterable[str], vocab_size: int, out: str | Path | None, where: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out}: expected a folder to save the tokenizer to, got a file")
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocab_size: expected at least {SMALLEST} (256 bytes, {len(SPECIAL)} tokens), got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    # Its pattern splits letters from signs, so no merge can ever spell a special token and take over its id.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_some(texts, where), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    if out is not None:
        tokenizer.save_pretrained(out)
    return tokenizer


def add_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Add ``<|im_start|>`` and ``<|im_end|>`` as special tokens, in place, where they are missing; return their ids.

    They take the first free rows: 50265 and 50266 of OPT's 50272.
    """
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (START, END)], special_tokens=True)
    return tuple(tokenizer.convert_tokens_to_ids([START, END]))


def _some(texts: Iterable[str], where: str) -> Iterator[str]:
    """The texts that are not empty. Raises UserError where there are none."""
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise UserError(f"{where}: expected text to train on, got none")


def _texts(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from read_text(path).splitlines(keepends=True)
    elif path.suffix == ".jsonl":
        for fields in read_jsonl(path):
            yield from _strings(fields)
    else:
        raise UserError(f"{path}: expected a .txt or .jsonl file, got {path.suffix or 'no suffix'}")


def _strings(value: Any) -> Iterator[str]:
    """All strings within a JSON value, but for the messages' roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not (key == "role" and "content" in value):
                yield from _strings(item)
