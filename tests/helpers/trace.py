"""Trace of one preference step: the functions and files of ours that run from a JSONL line to the optimizer step.

    python tests/helpers/trace.py        # prints both counts, and the functions by file

The first step of stage align on 8 pairs, with a model of 2 layers on the CPU, in a fresh process: nothing is cached,
and records are read, encoded and packed within the step. Functions, methods, lambdas and comprehensions count; the
bodies of modules and classes, which run once at import, do not, nor do functions that the import system calls (import
hooks).
"""

import collections
import inspect
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_FUNCTIONS, MOST_FILES = 220, 30
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def recipe_of(folder):
    """Eight pairs on disk, and a recipe of one step over them."""
    from dph.train import recipe

    pairs = [{"prompt": f"question {i}", "chosen": "yes it is", "rejected": "no"} for i in range(8)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return recipe.from_dict(
        {
            "stage": "align",
            "data": {"sources": [str(data)], "context": 64},
            "optimiser": {"steps": 1, "warmup": 1},
            "batch": {"size": 8},
            "output": {"directory": str(folder / "run"), "save_every": 0, "log_every": 1},
            "precision": "fp32",
            "device": "cpu",
        }
    )


def trace():
    """File, relative to the root -> names of the functions that ran during the step."""
    import torch
    from helpers.stages import tiny
    from helpers.texts import small_tokenizer

    from dph.train.entry import train
    from dph.train.trainer import Trainer

    torch.set_num_threads(1)
    functions = collections.defaultdict(set)

    def record(frame, event, _):
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED
        path = Path(code.co_filename)
        by_import = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith("<frozen importlib")
        if event == "call" and is_function and not by_import and path.is_relative_to(ROOT):
            functions[str(path.relative_to(ROOT))].add((code.co_firstlineno, code.co_name))

    step = Trainer.train_step

    def traced(*args, **kwargs):
        sys.setprofile(record)
        try:
            return step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    Trainer.train_step = traced
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = tiny(reward_dropout=0.0)  # as in the released alignment script
            train(recipe_of(Path(folder)), model=model, tokenizer=small_tokenizer(), quiet=True)
    finally:
        Trainer.train_step = step
    return {path: sorted(names) for path, names in sorted(functions.items()) if path.startswith("dph")}


def main():
    traced = trace()
    for path, names in traced.items():
        print(f"{path}: {' '.join(name for _, name in names)}")
    print(f"{sum(map(len, traced.values()))} functions in {len(traced)} files")


if __name__ == "__main__":
    main()
