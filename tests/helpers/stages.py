"""Tiny stages for tests: records in memory, a model of a few thousand parameters, and a recipe."""

import json
import os
import signal

import torch
from helpers.texts import conversation, small_tokenizer

import dph
from dph.data.batching import Streams
from dph.data.formats import Conversation, Encoder, Preference, Text
from dph.data.packing import PairBatches
from dph.data.sampler import Shuffled
from dph.data.sources import fingerprint
from dph.train import recipe, run_dir
from dph.train.entry import train

STAGES = ("pretrain", "vocab", "sft", "align", "head")


def tiny(seed=0, **changes):
    """A model for ``small_tokenizer``, in training mode, the same for the same seed."""
    tokenizer = small_tokenizer()
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer), "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2, "reward_pooler": "swiglu_bert",
        "im_end_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    return dph.Model(dph.ModelConfig(**(sizes | changes)))


def records(stage, count=23):
    """``count`` different records of the kind that the stage takes."""
    words = ["fox", "dogs", "hello", "world", "late", "12", "quick", "brown"]
    pick = lambda i: f"{words[i % 8]} {words[i * 3 % 7]} {i}"  # noqa: E731
    if stage == "pretrain":
        return [Text(f"The {pick(i)} and {pick(i + 1)}." * (1 + i % 3)) for i in range(count)]
    if stage in ("vocab", "sft"):
        return [Conversation(conversation(pick(i), f"yes {pick(i + 2)}")) for i in range(count)]
    return [
        Preference(conversation(pick(i), f"good {pick(i + 2)}"), conversation(pick(i), f"bad {pick(i)}"))
        for i in range(count)
    ]


def settings(stage, directory, **changes):
    """A recipe of 8 steps with a cache of its own; ``changes`` are dotted keys with __ for the dots."""
    values = {
        "stage": stage,
        "data": {"context": 24 if stage in ("pretrain", "vocab", "sft") else 200, "memory": 20, "memory_kind": "kv"},
        "optimiser": {"lr": 0.01, "final_lr": 0.001, "warmup": 2, "steps": 8},
        "batch": {"size": 4},
        "evaluation": {"every": 4},
        "output": {"directory": str(directory), "save_every": 3, "keep": 100, "log_every": 2},
        "precision": "fp32",
        "device": "cpu",
        "seed": 5,
    }
    if stage in ("align", "head", "sft"):
        values["optimiser"] |= {"prior_decay": 0.5, "no_decay": []}
    values["data"]["cache"] = f"{directory}/cache"
    for key, value in changes.items():
        *path, last = key.split("__")
        place = values
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return recipe.from_dict(values)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, two, **tolerance):
    """Two results of training have the same weights, bit for bit or within a tolerance."""
    for (name, a), b in zip(weights(one.model).items(), weights(two.model).values(), strict=True):
        assert torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b), name


def same_gradients(part, full):
    """The names of the parameters that have gradients in the model of one trainer: those of the other's.

    To rounding: where the embedding trains, too, log-probabilities are differentiated by other products.
    """
    expected, trained = dict(full.model.named_parameters()), set()
    for name, p in part.model.named_parameters():
        if p.grad is not None:
            trained.add(name)
            grad = expected[name].grad
            torch.testing.assert_close(p.grad, grad, rtol=0.0, atol=1e-5 * max(0.1, grad.abs().max().item()), msg=name)
    return trained


def go(recipe, data=None, model=None, **options):
    """Train on records in memory, with held-out ones."""
    stage = recipe.stage
    options = {"held_out": records(stage, 5), "quiet": True, **options}
    return train(recipe, model=model or tiny(), tokenizer=small_tokenizer(), records=data or records(stage), **options)


def figures(directory):
    """metrics.jsonl without what differs between equal runs."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in run_dir.MACHINE_METRICS} for line in lines]


class Trap(list):
    """Records that call ``action`` when the given number of them has been taken."""

    def __init__(self, items, after, action):
        super().__init__(items)
        self.left, self.action = after, action

    def fingerprint(self):
        """That of the records, without taking any."""
        return fingerprint(list(self))

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.action()
        return super().__getitem__(index)


class Killed(BaseException):
    """What ``die`` raises: as SIGKILL, it leaves no time to save."""


def die():
    raise Killed


def strike(number=signal.SIGTERM):
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def taken(recipe, steps):
    """How many records the first ``steps`` updates take."""
    order = Shuffled(records(recipe.stage), recipe.seed)
    encode, stage = Encoder(small_tokenizer()), recipe.stage
    batches = (
        PairBatches(order, encode, recipe.batch.size)
        if stage in ("align", "head")
        else Streams(order, encode, recipe.batch.size, recipe.data.context, 1)
    )
    for _ in range(steps):
        next(batches)
    return order.position
