"""Questions about a passage, and summaries of one.

Example: boolq, "Cats are mammals." and "are cats mammals", label 1; choices no, yes.
"""

from dph.errors import UserError
from dph.tasks.base import (
    CHOOSE_IN_CONTEXT,
    INSTRUCTION_OPTIONS,
    LETTERS,
    TRAIN_VALIDATION,
    Doc,
    Reference,
    Task,
    fields_of,
    letter,
    lettered,
    listed,
    number,
    object_of,
    texts,
)

COQA = (
    "Below is a background context and multiple questions. "
    "Respond with text from the background that correctly answers each question. "
    'If a question cannot be answered using the background context respond with "unknown".'
)


def race(name: str) -> Task:
    """Return a task of RACE, school examinations; ``all`` is ``middle`` and ``high`` together."""
    return Task(
        name=f"race/{name}",
        hub="ehovy/race",
        config=name,
        evaluated="test",
        metric="accuracy",
        fields=fields_of("article", "question", options=texts(maximum=len(LETTERS))),
        system=CHOOSE_IN_CONTEXT,
        prompt=lambda doc: f"Background: {doc['article']}\n\nQuestion: {doc['question']}\n\n{listed(doc['options'])}",
        options=lambda doc: lettered(doc["options"]),
        label=letter("answer", lambda doc: LETTERS[: len(doc["options"])]),
        example={
            "article": "Tom has a cat.",
            "question": "What does Tom have?",
            "options": ["a dog", "a cat", "a car", "a cap"],
            "answer": "B",
        },
    )


def one_answer_each(doc: Doc) -> None:
    """Check that every question of CoQA has an answer."""
    questions, answers = len(doc["questions"]), len(doc["answers"]["input_text"])
    if questions != answers:
        raise UserError(f"answers.input_text: expected {questions} answers, one for each question, got {answers}")


def coqa_dialogue(doc: Doc) -> list[str]:
    """Return the passage with the first question, then answers and questions in turn, up to the last question."""
    questions, answers = list(doc["questions"]), list(doc["answers"]["input_text"])
    questions[0] = f"Background: {doc['story']}\n\n{questions[0]}"
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [question, answer]
    return turns[:-1]


TASKS = [
    Task(
        name="boolq",
        hub="aps/super_glue",
        config="boolq",
        metric="accuracy",
        fields=fields_of("passage", "question"),
        system=INSTRUCTION_OPTIONS,
        prompt=(
            'Given the following sentences, answer the question with "yes" or "no".\n\n'
            "Background: {passage}\n\nQuestion: {question}?\n\nAnswer:"
        ),
        options=("no", "yes"),
        label=number("label"),
        example={"passage": "Cats are mammals.", "question": "are cats mammals", "label": 1},
    ),
    *map(race, ("all", "middle", "high")),
    Task(
        name="sciq/no_choice",
        hub="allenai/sciq",
        evaluated="test",
        metric="accuracy",
        fields=fields_of("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
        prompt=lambda doc: f"Background: {doc['support'].lstrip()}\n\nQuestion: {doc['question']}\n\nAnswer:",
        options=lambda doc: [doc[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")],
        label=Reference("correct_answer", lambda doc: 3),  # a field of its own, the last option
        example={
            "question": "What freezes?",
            "support": "Water freezes.",
            "distractor1": "fire",
            "distractor2": "light",
            "distractor3": "sound",
            "correct_answer": "water",
        },
    ),
    Task(
        name="coqa/all",
        hub="stanfordnlp/coqa",
        splits=TRAIN_VALIDATION,
        fields=fields_of("story", questions=texts(), answers=object_of(input_text=texts())),
        rule=one_answer_each,
        system=COQA,
        prompt=coqa_dialogue,
        right=lambda doc: doc["answers"]["input_text"][-1:],
        example={
            "story": "Tom has a cat.",
            "questions": ["Who has a cat?", "Is it big?"],
            "answers": {"input_text": ["Tom", "unknown"]},
        },
    ),
    Task(
        name="cnn_dailymail/3.0.0",
        hub="abisee/cnn_dailymail",
        config="3.0.0",
        fields=fields_of("article", "highlights"),
        system="Below is a long document. Write a concise summary for the document.",
        prompt="Article: {article}\n\nSummary:",
        right=lambda doc: [doc["highlights"]],
        example={"article": "Long news story.", "highlights": "Short summary."},
    ),
]
