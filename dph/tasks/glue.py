"""GLUE (Wang et al. 2018), nyu-mll/glue. The prompts' spelling is the paper's, mistakes included.

Example: cola, "The ship sank slowly.", label 1: does the sentence make sense? Choices no, yes.
"""

from collections.abc import Mapping
from typing import Any

from dph.tasks.base import HELD_OUT, INSTRUCTION_OPTIONS, Task, fields_of, number

NO_YES, YES_NO = ("no", "yes"), ("yes", "no")
ONE = (
    "Given the following sentence, answer the question with {answers}.\n\n"
    "Sentence: {{sentence}}\n\nQuestion: {question}\n\nAnswer:"
)
TWO = (
    "Given the following sentences, answer the question with {answers}.\n\n"
    "Sentence 1: {{{first}}}\n\nSentence 2: {{{second}}}\n\nQuestion: {question}\n\nAnswer:"
)
MNLI = (
    'Given a premise statement and a hypothesis statment, respond with "True" if the premise entails the hypothesis, '
    'respond with "False" if the premise contradicts the hypothesis, or respond with "Neither" if the statements are '
    "neurtral.\n\nPremise: {premise}\n\nHypothesis: {hypothesis}\n\nQuestion: True, False or Neither?\n\nAnswer:"
)
SAME = "Do both sentences mean the same thing?"


def glue(name: str, *, metric: str = "accuracy", **entry: Any) -> Task:
    """Return a GLUE task; its fields are the texts of the example."""
    names = [key for key in entry["example"] if key != "label"]
    return Task(
        name=f"glue/{name}",
        hub="nyu-mll/glue",
        config=name,
        system=INSTRUCTION_OPTIONS,
        fields=fields_of(*names),
        label=number("label"),
        metric=metric,
        **entry,
    )


def single(name: str, question: str, answers: str, options: tuple[str, ...], sentence: str, **entry: Any) -> Task:
    """Return a question about one sentence."""
    prompt = ONE.format(answers=answers, question=question)
    return glue(name, prompt=prompt, options=options, example={"sentence": sentence, "label": 1}, **entry)


def double(
    name: str,
    question: str,
    options: tuple[str, ...],
    example: Mapping[str, Any],
    answers: str = '"yes" or "no"',
    **entry: Any,
) -> Task:
    """Return a question about two sentences, the first two fields of the example."""
    first, second, _ = example
    prompt = TWO.format(answers=answers, question=question, first=first, second=second)
    return glue(name, prompt=prompt, options=options, example=example, **entry)


def mnli(name: str, splits: Mapping[str, str], **entry: Any) -> Task:
    """Return natural language inference: does the premise entail the hypothesis?"""
    example = {"premise": "A man is outside.", "hypothesis": "Nobody is outside.", "label": 2}
    return glue(name, prompt=MNLI, options=("True", "Neither", "False"), splits=splits, example=example, **entry)


PAIR = {"sentence1": "A dog barked.", "sentence2": "An animal made noise."}

TASKS = [
    single(
        "cola",
        "Does this sentence make sense?",
        '"yes" or "no"',
        NO_YES,
        "The ship sank slowly.",
        metric="matthews",
    ),
    single(
        "sst2",
        "Is this sentence positive or negative?",
        '"positive" or "negative"',
        ("negative", "positive"),
        "a gripping film ",
    ),
    mnli("mnli", {"train": "train", "validation": "validation_matched", "test": "test_matched"}),
    mnli("mnli_matched", HELD_OUT),
    mnli("mnli_mismatched", HELD_OUT),
    mnli("ax", {"test": "test"}, evaluated="test", metric="matthews"),
    double("mrpc", SAME, NO_YES, PAIR | {"label": 1}, metric="f1"),
    double("rte", SAME, YES_NO, PAIR | {"label": 0}),
    double(
        "qnli",
        "Does Sentence 2 correctly answer Sentence 1?",
        YES_NO,
        {"question": "Who wrote it?", "sentence": "It was written by Ada.", "label": 0},
    ),
    double(
        "qqp",
        "Do both sentences ask the same question?",
        NO_YES,
        {"question1": "How old is it?", "question2": "What is its age?", "label": 1},
        metric="f1",
    ),
    double(
        "stsb",
        "On a scale of 0 to 5 how similar are Sentence 1 and Sentence 2?",
        ("0", "1", "2", "3", "4", "5"),
        PAIR | {"label": 3.6},
        answers="a number between 0 and 5",
        metric="pearson_spearman",
    ),
    double(
        "wnli",
        "Based on the information in Sentence 1, can we concluded that Sentence 2 is true?",
        NO_YES,
        {"sentence1": "The cup fell because it was wet.", "sentence2": "The cup was wet.", "label": 1},
    ),
]
