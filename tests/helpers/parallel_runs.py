"""One of two processes that train together (gloo, CPU): run by test_parallel.py, in an environment like torchrun's.

    python parallel_runs.py FOLDER DEVICE

Runs every case (on GPUs, only what they compute), and leaves in FOLDER/found what this process saw of each. Exits with
NO_GLOO and the reason where the processes cannot find each other.
"""

import errno
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.stages import Trap, go, records, settings, strike, taken, tiny, weights
from helpers.tiny import FORMS
from helpers.two import meeting
from safetensors.torch import save_file

import dph
from dph.cli.main import explain
from dph.data.labels import Label, Labelled
from dph.errors import UserError
from dph.train import checkpointing, distributed
from dph_kernels import dispatch

RANK = int(os.environ.get("RANK", 0))
DEVICE = sys.argv[2] if __name__ == "__main__" else "cpu"
SMOOTH = {"optimiser__eps": 1e-3, "optimiser__clip": 0.2}  # of gradients that are but rounding, LaProp makes none large
QUICK = {"output__log_every": 1, "output__save_every": 0, "evaluation__every": 0}

HEADS = {"reward_heads": ["a", "b"], "reward_dropout": 0.5}

# name: stage, changes of the recipe, of the model
CASES = {
    "sft": ("sft", {"batch__micro": 1}, {}),
    "sft-replicate": ("sft", {"batch__micro": 1, "parallel": "replicate", "data__memory_place": "host"}, {}),
    "sft-hidden": ("sft", {"data__memory_kind": "hidden", "checkpointing": "block"}, {}),
    "vocab": ("vocab", {}, {}),
    "align-tokens": ("align", {"batch__tokens": 110}, {"reward_dropout": 0.5}),
    "align-cache": ("align", {"batch__micro": 1, "parallel": "replicate", "objective__reference": "cache"}, {}),
    "head": ("head", {"batch__micro": 1}, {"reward_dropout": 0.5}),
    "head-backbone": (
        "head",
        {"batch__tokens": 110, "data__cache_states": False, "parallel": "replicate"},
        {"reward_dropout": 0.5},
    ),
    "sft-llama": ("sft", {"batch__micro": 1}, FORMS["llama"]),
    "align-qwen3": ("align", {"batch__tokens": 110}, FORMS["qwen3"]),
    "align-bf16": ("align", {"precision": "bf16", "objective__reference": "cache"}, {}),
    "align-lora": ("align", {"lora__rank": 3}, {}),
    "align-last": ("align", {"train__last_layers": 1, "batch__micro": 1}, {}),
    "sft-lora-last": ("sft", {"lora__rank": 3, "train__last_layers": 1, "parallel": "replicate"}, FORMS["llama"]),
    "head-labelled": ("head", {"objective__heads": ["a", "b"], "batch__size": 2}, HEADS),
    "align-labelled": ("align", {"objective__heads": ["a", "b"], "objective__dpo_weight": 0.0}, HEADS),
    "align-frozen": (
        "align",
        {
            "train__frozen": ["backbone.embedding.*", "*.bias"],
            "optimiser__head_weight_decay": 0.1,
            "optimiser__head_prior_decay": 0.0,
            "objective__dpo_mean": True,
            "batch__micro": 1,
        },
        {},
    ),
    "head-bf16": ("head", {"precision": "bf16"}, {}),
}
RESUMED = {"sft": {}, "align": {"parallel": "replicate"}}


def recipe_of(stage, directory, **changes):
    return settings(stage, directory, **SMOOTH | QUICK | {"device": DEVICE} | changes)


def data_of(name):
    """Training records of a case; labelled ones, among plain pairs, name one of two heads.

    With one record a rank, some rank of most steps has no label for a head.
    """
    stage = CASES[name][0]
    pairs = records(stage)
    if not name.endswith("labelled"):
        return pairs
    found = []
    for i, pair in enumerate(pairs):
        head = "ab"[i % 2]
        if i % 6 == 0:
            found.append(pair)
        elif i % 3 == 0:
            found.append(Labelled([pair.chosen, pair.rejected], (Label(0, 1, head),)))
        elif i % 3 == 1:
            found.append(Labelled([pair.chosen], (Label(0, None, head),)))
        else:
            answers = [pair.rejected, pair.chosen, pairs[i - 1].rejected]
            found.append(Labelled(answers, (Label(None, 0, head, 0.5), Label(1, 2, head, 0.25))))
    return found


def note(folder, name, model=None, **values):
    """What this process found."""
    found = folder / "found"
    found.mkdir(exist_ok=True)
    (found / f"{name}-{RANK}.json").write_text(json.dumps(values))
    if model is not None:
        save_file(weights(model), found / f"{name}-{RANK}.safetensors")


def cases(folder):
    for name, (stage, changes, model) in CASES.items():
        result = go(recipe_of(stage, folder / name, **changes), data_of(name), model=tiny(**model))
        note(folder, name, result.model, step=result.step, evaluation=result.evaluation)


def alone(folder, name, work):
    """Process 0 without the others, who wait."""
    done = folder / f"{name}.done"
    if RANK == 0:
        size = os.environ.pop("WORLD_SIZE")
        work()
        os.environ["WORLD_SIZE"] = size
        done.touch()
    while not done.exists():
        time.sleep(0.05)


def resumes(folder):
    """Two processes until one is struck, then one alone, then two to the end."""
    for stage, changes in RESUMED.items():
        recipe = recipe_of(stage, folder / f"resumed-{stage}", **changes)
        data = records(stage)
        strikes = 9 if RANK == 1 else 10**9
        stopped = go(recipe, Trap(data, strikes, strike))
        note(folder, f"struck-{stage}", step=stopped.step, interrupted=stopped.interrupted)
        one = recipe_of(stage, folder / f"resumed-{stage}", **changes, batch__micro=1)
        alone(folder, stage, lambda r=one, d=data: go(r, Trap(d, 5, strike), resume=True))
        result = go(recipe, resume=True)
        note(folder, f"resumed-{stage}", result.model, step=result.step)


def spoil(call, every=False):
    """Makes rewards of process 1 NaN: of the ``call``-th forward pass with gradients, or of all from there on."""
    original, left = dph.Model.forward_packed, [call]

    def wrapped(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        left[0] -= torch.is_grad_enabled()
        if torch.is_grad_enabled() and RANK == 1 and (left[0] == 0 or (every and left[0] < 0)):
            out.rewards["default"].data[-1] = math.nan
        return out

    dph.Model.forward_packed = wrapped
    return original


def spoilt(folder):
    original = spoil(5)
    result = go(recipe_of("align", folder / "nan", output__save_every=1), held_out={})
    note(folder, "nan", result.model, step=result.step)
    dph.Model.forward_packed = original


def caught(folder, name, work):
    """What ended this process's run; the group is one that a process has no longer after an error."""
    try:
        work()
    except Exception as error:
        note(folder, name, kind=type(error).__name__, text=explain(error))
    dist.destroy_process_group()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def failures(folder):
    original = spoil(5, every=True)
    caught(folder, "diverged", lambda: go(recipe_of("align", folder / "diverged", guard__stop_after=2), held_out={}))
    dph.Model.forward_packed = original
    caught(folder, "uneven", lambda: go(recipe_of("align", folder / "uneven", batch__size=3)))
    for rank in (0, 1):
        recipe = recipe_of("sft", folder / f"full-{rank}", optimiser__steps=4)
        go(recipe, Trap(records("sft"), 5, strike))
        write = checkpointing.write_tensors
        checkpointing.write_tensors = full if rank == RANK else write
        caught(folder, f"full-{rank}", lambda r=recipe: go(r, Trap(records("sft"), 2, strike), resume=True))
        checkpointing.write_tensors = write


def data_error(folder):
    """Process 1 alone cannot read a record of step 4: both save step 3, and go on from it."""
    recipe = recipe_of("sft", folder / "data-error", output__save_every=0)
    after = taken(recipe, 3) + 2 if RANK == 1 else 10**9
    caught(folder, "data-error", lambda: go(recipe, Trap(records("sft"), after, no_record)))
    result = go(recipe, resume=True)
    note(folder, "data-error-resumed", result.model, step=result.step)


def no_record():
    raise UserError("chats.jsonl: the file changed")


def main(folder):
    dispatch.SMALL_ELEMENTS = 0  # as the fixture every_kernel
    with meeting(), distributed.init_distributed("shard", DEVICE):
        pass
    for part in (cases, resumes, spoilt, failures, data_error) if DEVICE == "cpu" else (cases,):
        began = time.monotonic()
        part(folder)
        print(part.__name__, round(time.monotonic() - began, 1), "s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is shown. At Python's end a thread of PyTorch's that still wants the interpreter would abort the process.
    sys.stdout.flush()
    os._exit(0)
