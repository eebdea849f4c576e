"""Who has what, where the number of processes changes: parts of an update, and memories of streams."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def deal(bins: Sequence[list[int]], sizes: Sequence[int], rank: int, size: int) -> list[list[int]]:
    """The bins of process ``rank`` of ``size``: as many as everyone's, alike in what they take, none left out.

    Args:
        bins: places of an update's pairs, by what goes through the model together.
        sizes: tokens of each pair; as many pairs as can be dealt evenly one by one.

    Where the bins do not come out even, the fullest with several pairs are halved until they do.
    """
    if size == 1:
        return list(bins)

    def fullness(places: list[int]) -> int:
        return sum(sizes[place] for place in places)

    dealt = list(bins)
    while len(dealt) % size:
        fullest = max((places for places in dealt if len(places) > 1), key=fullness)
        dealt.remove(fullest)
        dealt += [fullest[0::2], fullest[1::2]]
    return sorted(dealt, key=fullness, reverse=True)[rank::size]  # those that are at work together are alike


def memory_state(tensors: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    """The state (``Memory.state_dict``) of streams ``first`` to ``first + count``, cut out of others.

    Args:
        tensors: states of memories under ``N/``, where N grows with the streams of the memory.

    Memories of one run differ in nothing but their streams. Before their first call they have none.
    """
    blocks = sorted({int(key.split("/")[0]) for key in tensors})
    names = [key.split("/")[1] for key in tensors if key.startswith(f"{blocks[0]}/")]
    cuts, start = [], 0
    for block in blocks:
        streams = len(tensors[f"{block}/seen"])
        low, high = max(first - start, 0), min(first + count - start, streams)
        if low < high:
            cuts.append((block, slice(low, high)))
        start += streams

    def cut(name: str) -> Tensor:
        found = tensors[f"{blocks[0]}/{name}"]
        if found.ndim == 0 or not cuts:  # a number, the same for all
            return found
        rows = [tensors[f"{block}/{name}"][streams] for block, streams in cuts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    return {name: cut(name) for name in names}
