"""Common sense and knowledge, by choosing or by continuing.

Example: arc/easy, "Which is a gas?", lists "A. ice", "B. steam", ...; the right answer is "B. steam".
"""

from collections.abc import Callable, Sequence
from typing import Any

from dph.errors import UserError, shown
from dph.tasks.base import (
    CHOOSE,
    CHOOSE_IN_CONTEXT,
    LETTERS,
    SPLITS,
    Doc,
    Task,
    fields_of,
    letter,
    lettered,
    listed,
    number,
    number_or_letter,
    object_of,
    one_of,
    text,
    texts,
)


def choices_with_labels(value: Any, name: str) -> None:
    """Check an object of two lists, text and label, or a list of objects, as in the files of ARC's authors."""
    if not isinstance(value, list):
        object_of(text=texts(), label=texts())(value, name)
        return
    if not value:
        raise UserError(f"{name}: expected at least one choice, got none")
    for i, choice in enumerate(value):
        object_of(text=text, label=text)(choice, f"{name}[{i}]")


def texts_and_labels(doc: Doc) -> tuple[Sequence[str], Sequence[str]]:
    """Return the texts of the choices and their labels."""
    choices = doc["choices"]
    if isinstance(choices, list):
        return [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    return choices["text"], choices["label"]


def one_label_each(doc: Doc) -> None:
    """Check that the choices have labels of their own."""
    options, labels = texts_and_labels(doc)
    if len(labels) != len(options):
        raise UserError(f"choices: expected as many labels as texts, got {len(options)} texts and {len(labels)} labels")
    if len(set(labels)) != len(labels):
        raise UserError(f"choices.label: expected different labels, got {shown(labels)}")


def labelled(name: str, hub: str, config: str, question: str, example: Doc) -> Task:
    """Return a task of ARC or OpenBookQA, whose choices come with their labels."""
    return Task(
        name=name,
        hub=hub,
        config=config,
        evaluated="test",
        metric="accuracy",
        fields=fields_of(question, choices=choices_with_labels),
        rule=one_label_each,
        system=CHOOSE,
        prompt=lambda doc: f"Question: {doc[question]}\n\n{listed(*texts_and_labels(doc))}",
        options=lambda doc: lettered(*texts_and_labels(doc)),
        label=letter("answerKey", lambda doc: texts_and_labels(doc)[1]),
        example=example,
    )


def hellaswag(name: str, **entry: Any) -> Task:
    """Return HellaSwag, with the endings listed or not."""
    return Task(
        name=f"hellaswag/{name}",
        hub="Rowan/hellaswag",
        metric="accuracy",
        fields=fields_of("ctx", endings=texts(maximum=len(LETTERS))),
        label=number("label"),
        example={
            "ctx": "A woman is holding a dog. She",
            "endings": ["rinses it.", "flies away.", "eats soap.", "reads a map."],
            "label": "0",
        },
        **entry,
    )


def one_blank(doc: Doc) -> None:
    """Check that a WinoGrande sentence has a blank."""
    if "_" not in doc["sentence"]:
        raise UserError(f"sentence: expected a text with a blank (_), got {shown(doc['sentence'])}")


def blank(doc: Doc) -> tuple[str, str]:
    """Return the text before and after the blank of a WinoGrande sentence."""
    before, _, after = doc["sentence"].partition("_")
    return before.strip(), after.strip()


CONNECTORS = {"cause": "because", "effect": "therefore"}


def copa_prompt(doc: Doc) -> str:
    """Return the premise without its full stop, and the connector to its cause or effect."""
    return f"{doc['premise'].strip()[:-1]} {CONNECTORS[doc['question']]}"


def either(first: str, second: str) -> Callable[[Doc], list[str]]:
    """Return a function that gives two fields of the document as options."""
    return lambda doc: [doc[first], doc[second]]


ARC = {"choices": {"label": ["A", "B", "C", "D"], "text": ["ice", "steam", "rock", "sand"]}, "answerKey": "B"}

TASKS = [
    hellaswag("no_choice", prompt='Continue the following sentence:\n"{ctx}"', options=lambda doc: doc["endings"]),
    hellaswag(
        "choice",
        system=CHOOSE_IN_CONTEXT,
        prompt=lambda doc: (
            f'What is the most appropriate completion for the following text?\n"{doc["ctx"]}"\n\n'
            + listed(doc["endings"])
        ),
        options=lambda doc: lettered(doc["endings"]),
    ),
    labelled("arc/easy", "allenai/ai2_arc", "ARC-Easy", "question", {"question": "Which is a gas?", **ARC}),
    labelled("arc/challenge", "allenai/ai2_arc", "ARC-Challenge", "question", {"question": "Which is a gas?", **ARC}),
    labelled("openbookqa/main", "allenai/openbookqa", "main", "question_stem", {"question_stem": "A gas is", **ARC}),
    Task(
        name="winogrande/no_choice",
        hub="allenai/winogrande",
        config="winogrande_xl",
        metric="accuracy",
        fields=fields_of("sentence", "option1", "option2"),
        rule=one_blank,
        prompt=lambda doc: f'Continue the following sentence:\n"{blank(doc)[0]}"',
        options=lambda doc: [f"{doc[option]} {blank(doc)[1]}" for option in ("option1", "option2")],
        label=number("answer", first=1),
        example={"sentence": "Ann thanked Bea since _ was kind.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ),
    Task(
        name="copa",
        hub="aps/super_glue",
        config="copa",
        metric="accuracy",
        fields=fields_of("premise", "choice1", "choice2", question=one_of(*CONNECTORS)),
        prompt=copa_prompt,
        options=either("choice1", "choice2"),
        label=number("label"),
        example={
            "premise": "The man fell.",
            "choice1": "He slipped.",
            "choice2": "He sang.",
            "question": "cause",
            "label": 0,
        },
    ),
    Task(
        name="piqa",
        hub="baber/piqa",
        metric="accuracy",
        fields=fields_of("goal", "sol1", "sol2"),
        prompt='Write a solution to the following sentence:\n"{goal}"',
        options=either("sol1", "sol2"),
        label=number("label"),
        example={"goal": "Open a jar.", "sol1": "Twist the lid.", "sol2": "Freeze the lid.", "label": 0},
    ),
    Task(
        name="mmlu/all",
        hub="cais/mmlu",
        config="all",
        splits=SPLITS | {"train": "auxiliary_train", "fewshot": "dev"},  # few-shot examples: same subject
        evaluated="test",
        metric="accuracy",
        fields=fields_of("question", choices=texts(maximum=len(LETTERS))),
        system=CHOOSE,
        prompt=lambda doc: f"Question: {doc['question']}\n\n{listed(doc['choices'])}",
        options=lambda doc: lettered(doc["choices"]),
        label=number_or_letter("answer", "choices"),
        example={"question": "2+2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "math"},
    ),
]
