"""Labels of a micro-batch of answers as tensors, for the loss and for held-out metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dph.data.labels import labels_of
from dph.errors import UserError
from dph_kernels.preference_loss import Labels
from dph_kernels.transfer import all_to_device

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.train.recipe import Recipe

MAX_ANSWERS = 2**20  # of a record


class AnswerLabels(NamedTuple):
    """P labels on the A answers of N records.

    Attributes:
        better, worse: [P] int64 answers; A for an absent one.
        records: [A] int64 record of each answer.
        weights: of the labels, for `preference_loss`.
    """

    better: Tensor
    worse: Tensor
    records: Tensor
    weights: Labels

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values [P, ...] of better and worse answers, of [A, ...]; 0 for an absent one."""
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded[self.better], padded[self.worse]

    def sum_by_record(self, values: Tensor) -> Tensor:
        """Return the sums over each record's answers, of [A]: the first N of [A], whose number the host knows."""
        return torch.zeros_like(values).index_add(0, self.records, values)


def label_weights(records: Sequence[Sequence[Encoded]], heads: Sequence[str]) -> dict[str, Tensor]:
    """Return the weights of all labels on ``records``: chosen, rejected [P, K]; pairs, margin [P] (`Labels`).

    Args:
        heads: name of the head of each of K columns.
    """
    columns: Mapping[str, list] = {"chosen": [], "rejected": [], "pairs": [], "margin": []}
    for answers in records:
        for label in labels_of(answers):
            weights = [label.weight if label.head in (None, head) else 0.0 for head in heads]
            columns["chosen"].append([0.0] * len(heads) if label.better is None else weights)
            columns["rejected"].append([0.0] * len(heads) if label.worse is None else weights)
            columns["pairs"].append(label.weight if label.is_pair else 0.0)
            columns["margin"].append(label.margin)
    return {name: torch.tensor(values) for name, values in columns.items()}


def label_totals(records: Sequence[Sequence[Encoded]], heads: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the totals of the labels on a step's records (`Labels`), relative to the number of records.

    So the losses of its micro-batches are sums over records: those of N plain pairs have totals of 1.
    """
    weights = label_weights(records, heads)
    chosen, rejected = weights["chosen"].sum(0), weights["rejected"].sum(0)
    totals = torch.stack([(chosen + rejected) / 2, chosen, rejected])
    return totals / len(records), weights["pairs"].sum() / len(records)


def answer_labels(
    records: Sequence[Sequence[Encoded]],
    heads: Sequence[str],
    totals: tuple[Tensor, Tensor],
    device: torch.device,
) -> AnswerLabels:
    """Return the labels on the answers of ``records``, end to end, on ``device``; ``totals``: of the step."""
    weights = label_weights(records, heads)
    tensors = all_to_device([*label_indices(records), *weights.values(), *totals], device)
    return AnswerLabels(*tensors[:3], Labels(*tensors[3:]))


def label_indices(records: Sequence[Sequence[Encoded]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the better and the worse answer of each label, A for none, and the record of each of A answers."""
    better, worse, numbers = [], [], []
    count = sum(map(len, records))
    for number, answers in enumerate(records):
        first = len(numbers)
        numbers += [number] * len(answers)
        for label in labels_of(answers):
            better.append(count if label.better is None else first + label.better)
            worse.append(count if label.worse is None else first + label.worse)
    better, worse, numbers = (torch.tensor(values, dtype=torch.int64) for values in (better, worse, numbers))
    return better, worse, numbers


def answer_keys(first: int, indices: Sequence[int], records: Sequence[Sequence[Encoded]]) -> list[int]:
    """Return keys of the answers' dropout masks that no other answer of the run has.

    Args:
        first: number of the first record of the step.
        indices: positions of the records in the step.
    """
    keys: list[int] = []
    for index, answers in zip(indices, records, strict=True):
        keys += [(first + index) * MAX_ANSWERS + i for i in range(len(answers))]
    return keys


def require_separable(recipe: Recipe, got: str) -> None:
    """Raise UserError if a part of the recipe's objective compares answers; ``got`` describes one without another."""
    objective = recipe.objective
    if objective.dph_weight > 0 and objective.objective != "separable":
        compares = f"{objective.objective}, which compares two answers"
        raise UserError(f"objective.objective: expected separable, got {compares}, with one {got}")
    if recipe.stage == "align" and objective.dpo_weight > 0:
        raise UserError(f"objective.dpo_weight: expected 0, as cDPO compares two answers, got one {got}")
