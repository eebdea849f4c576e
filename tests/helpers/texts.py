"""A small tokenizer and small texts for tests."""

import functools
import json

from dph.data import tokenizer

TEXTS = ["The quick brown fox, and 12 lazy dogs.\nIt's late.", "user assistant system hello hello world"] * 4


@functools.cache
def small_tokenizer():
    return tokenizer.from_iterator(TEXTS, 400)


def message(role, content):
    return {"role": role, "content": content}


def conversation(question, answer):
    return [message("user", question), message("assistant", answer)]


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
