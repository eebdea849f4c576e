"""SQuAD (Rajpurkar et al. 2016, 2018): the answer is a span of the passage; in v2 some questions have none.

Example: squad/v2, "Paris is the capital." and "What is the capital?"; right answer "Paris", wrong "unanswerable".
"""

import functools
from collections.abc import Sequence
from typing import Any

from dph.errors import UserError
from dph.tasks.base import TRAIN_VALIDATION, Doc, Task, fields_of, object_of, texts

UNANSWERABLE = "unanswerable"
SPACY_MODEL = "en_core_web_md"  # as in the paper's code
EXTRACT = (
    "Below is a question, paired with a background context. "
    "Respond with text from the background that correctly answers the question."
)
EXTRACT_OR_NOT = (
    f'{EXTRACT} If the questions cannot be answered using the background context, respond with "{UNANSWERABLE}".'
)


@functools.cache
def _spacy_model() -> Any:
    command = f"pip install spacy && python -m spacy download {SPACY_MODEL}"
    reason = f"task squad/v2: the wrong answer to an unanswerable question is a noun phrase that spaCy finds: {command}"
    try:
        import spacy
    except ImportError:
        raise UserError(reason) from None
    try:
        return spacy.load(SPACY_MODEL)
    except OSError:
        raise UserError(reason) from None


@functools.lru_cache(maxsize=4096)  # several questions share a passage
def noun_phrases(passage: str) -> tuple[str, ...]:
    """Return the distinct noun phrases of a passage in order. Raises UserError if spaCy or its model is missing."""
    return tuple(dict.fromkeys(chunk.text for chunk in _spacy_model()(passage).noun_chunks))


def squad_prompt(doc: Doc) -> str:
    """Return title, passage and question."""
    return f"Title: {doc['title']}\n\nBackground: {doc['context']}\n\nQuestion: {doc['question'].strip()}\n\nAnswer:"


def squad_v2_wrong(doc: Doc) -> Sequence[str]:
    """Return "unanswerable" for a question with an answer, else the noun phrases of the passage."""
    return [UNANSWERABLE] if doc["answers"]["text"] else noun_phrases(doc["context"])


def squad(name: str, hub: str, **entry: Any) -> Task:
    """Return a task of SQuAD."""
    example = {
        "title": "France",
        "context": "Paris is the capital.",
        "question": "What is the capital?",
        "answers": {"text": ["Paris"], "answer_start": [0]},
    }
    return Task(
        name=f"squad/{name}",
        hub=hub,
        splits=TRAIN_VALIDATION,
        fields=fields_of("title", "context", "question", answers=object_of(text=texts(minimum=0))),
        prompt=squad_prompt,
        example=example,
        **entry,
    )


TASKS = [
    squad("v1.1", "rajpurkar/squad", system=EXTRACT, right=lambda doc: doc["answers"]["text"]),
    squad(
        "v2",
        "rajpurkar/squad_v2",
        system=EXTRACT_OR_NOT,
        right=lambda doc: doc["answers"]["text"] or [UNANSWERABLE],
        wrong=squad_v2_wrong,
    ),
]
