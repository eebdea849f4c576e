"""Open instructions, stories and preference pairs.

Example: alpaca/cleaned, "Add." with the input "1 and 2", is answered "3".
"""

from typing import Any

from dph import chat
from dph.tasks.base import INSTRUCTION, TRAIN, Doc, Task, fields_of, text_or_null

WITH_INPUT = INSTRUCTION.replace("a task.", "a task, paired with an input that provides further context.")


def alpaca_prompt(doc: Doc) -> str:
    """Return the instruction, followed by its input if it has one."""
    given_input = f"Input: {doc['input']}\n\n" if doc["input"] else ""
    return f"Instruction: {doc['instruction']}\n\n{given_input}Answer:"


def answered(value: Any, name: str) -> None:
    """Check a list of messages, the last of which is the assistant's."""
    chat.check(value, name)
    chat.check_final_answer(value, name)


def ultrafeedback_answer(doc: Doc, side: str) -> list[str]:
    """Return the answer of one side: the final message, which is the assistant's.

    As in the paper's code, a side that begins with another user message than the prompt has its answer there.
    """
    messages = doc[side]
    is_other = messages[0]["role"] == "user" and messages[0]["content"].strip() != doc["prompt"].strip()
    return [messages[0 if is_other else -1]["content"]]


def tinystories(name: str, names: tuple[str, ...], prompt: str) -> Task:
    """Return a task of stories that a small child understands."""
    return Task(
        name=f"tinystories/{name}",
        hub="skeskinen/TinyStories-GPT4",
        splits=TRAIN,
        fields=fields_of(*names),
        prompt=prompt,
        right=lambda doc: [doc["story"]],
        example={"prompt": "Write a story.", "story": "Once upon a time.", "summary": "A tale."},
    )


TASKS = [
    Task(
        name="alpaca/cleaned",
        hub="yahma/alpaca-cleaned",
        splits=TRAIN,
        fields=fields_of("instruction", "output", input=text_or_null),
        system=lambda doc: WITH_INPUT if doc["input"] else INSTRUCTION,
        prompt=alpaca_prompt,
        right=lambda doc: [doc["output"]],
        example={"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ),
    tinystories("instruct", ("prompt", "story"), "{prompt}"),
    tinystories(
        "summary",
        ("summary", "story"),
        "Based on the following summary write a short story (3-5 paragraphs) which only uses very simple words that a "
        "3 year old child would understand.\n\nSummary: {summary}\n\nStory:",
    ),
    Task(
        name="orca/openorca",
        hub="Open-Orca/OpenOrca",
        splits=TRAIN,
        fields=fields_of("question", "response", system_prompt=text_or_null),
        system=lambda doc: doc["system_prompt"] or INSTRUCTION,
        prompt="{question}",
        right=lambda doc: [doc["response"]],
        example={"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
    ),
    Task(
        name="orca/dpo_pairs",
        hub="Intel/orca_dpo_pairs",
        splits=TRAIN,
        fields=fields_of("question", "chosen", "rejected", system=text_or_null),
        system=lambda doc: doc["system"] or INSTRUCTION,
        prompt="{question}",
        right=lambda doc: [doc["chosen"]],
        wrong=lambda doc: [doc["rejected"]],
        example={"system": "", "question": "Why?", "chosen": "Because.", "rejected": "No."},
    ),
    Task(
        name="ultrafeedback/binarized",
        hub="argilla/ultrafeedback-binarized-preferences-cleaned",
        splits=TRAIN,
        fields=fields_of("prompt", chosen=answered, rejected=answered),
        prompt="{prompt}",
        right=lambda doc: ultrafeedback_answer(doc, "chosen"),
        wrong=lambda doc: ultrafeedback_answer(doc, "rejected"),
        keep=lambda doc: doc["chosen"] != doc["rejected"],
        example={
            "prompt": "Say hi.",
            "chosen": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}],
            "rejected": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "No."}],
        },
    ),
]
