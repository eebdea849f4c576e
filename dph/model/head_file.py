"""A reward head alone in a directory: its weights, its form, and the backbone that it was trained on.

head.json          name, form (pooler, layer, ...), name and digest of the backbone, and what the writer adds
head.safetensors   the weights, by their names within ``RewardHead``
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dph._folder import read_json
from dph.data import atomic
from dph.errors import UserError, shown

DESCRIPTION, WEIGHTS = "head.json", "head.safetensors"
FORMAT = 1
FORM = ("pooler", "intermediate_size", "dropout", "layer", "standardised")
"""Fields of a head's form: arguments of ``RewardHead``."""


@dataclass(frozen=True)
class HeadFile:
    """Content of a head's directory.

    Attributes:
        name: of the head.
        form: arguments of ``RewardHead`` named in ``FORM``.
        hidden_size: C of the backbone.
        backbone: ``name`` and ``digest`` of the backbone.
        about: what else the description holds.
        path: the directory.
    """

    name: str
    form: dict[str, Any]
    hidden_size: int
    backbone: dict[str, str]
    about: dict[str, Any]
    path: Path

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by their names within ``RewardHead``, with the head's own name."""
        return load_file(self.path / WEIGHTS)


def is_head(path: str | os.PathLike) -> bool:
    """Whether a path is the directory of a head."""
    return Path(path, DESCRIPTION).is_file()


def backbone_digest(backbone: nn.Module) -> str:
    """Return a digest of a backbone's weights, the same in every dtype that represents them exactly.

    A model that is read in fp32 from a bf16 file has the digest of the bf16 one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(backbone.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write(
    directory: str | os.PathLike,
    name: str,
    form: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    backbone: Mapping[str, str],
    about: Mapping[str, Any],
) -> None:
    """Write a head's directory, all at once; see :class:`HeadFile`."""
    hidden_size = weights[f"reward.{name}.weight"].shape[1]
    fields = {
        "format": FORMAT,
        "name": name,
        "form": dict(form),
        "hidden_size": hidden_size,
        "backbone": dict(backbone),
        "about": dict(about),
    }
    with atomic.new_files(directory, last=DESCRIPTION) as folder:
        tensors = {key: weight.detach().to("cpu").contiguous() for key, weight in weights.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / DESCRIPTION).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read(directory: str | os.PathLike) -> HeadFile:
    """Return the description of a head's directory.

    Raises UserError, which begins with the file, if it is missing, broken or of a later format.
    """
    path = Path(directory)
    where = path / DESCRIPTION
    if not where.is_file():
        raise UserError(f"{path}: expected the directory of a reward head, got one without {DESCRIPTION}")
    fields = read_json(where)
    if fields.get("format") != FORMAT:
        raise UserError(f"{where}: format: expected {FORMAT}, got {shown(fields.get('format'))}")
    for key, kind in (("name", str), ("form", dict), ("hidden_size", int), ("backbone", dict), ("about", dict)):
        if not isinstance(fields.get(key), kind):
            raise UserError(f"{where}: {key}: expected a {kind.__name__}, got {shown(fields.get(key))}")
    if set(fields["form"]) != set(FORM):
        raise UserError(f"{where}: form: expected {', '.join(FORM)}, got {shown(sorted(fields['form']))}")
    if not all(isinstance(fields["backbone"].get(key), str) for key in ("name", "digest")):
        raise UserError(f"{where}: backbone: expected name and digest, got {shown(fields['backbone'])}")
    names = ("name", "form", "hidden_size", "backbone", "about")
    return HeadFile(*(fields[name] for name in names), path)
