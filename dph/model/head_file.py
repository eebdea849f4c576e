"""A reward head alone in a directory: its weights, its form, and the backbone that it was trained on.

head.json          name, form (pooler, layer, ...), name and digest of the backbone, and what the writer adds
head.safetensors   the weights, by their names within ``RewardHead``
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dph._folder import read_json
from dph.data import atomic
from dph.errors import UserError, shown
from dph.model.heads import RewardHead

if TYPE_CHECKING:
    from dph.model.judging import JudgingModel

DESCRIPTION, WEIGHTS = "head.json", "head.safetensors"
FORMAT = 1
FORM = ("pooler", "intermediate_size", "dropout", "layer", "standardised")
"""Fields of a head's form: arguments of ``RewardHead``. ``members`` is a further one of an ensemble."""


@dataclass(frozen=True)
class HeadFile:
    """Content of a head's directory.

    Attributes:
        name: of the head.
        form: arguments of ``RewardHead`` named in ``FORM``.
        hidden_size: C of the backbone.
        backbone: ``name`` and ``digest`` of the backbone, and the digest of its weights in ``bfloat16``.
        about: what else the description holds.
        path: the directory.
    """

    name: str
    form: dict[str, Any]
    hidden_size: int
    backbone: dict[str, str]
    about: dict[str, Any]
    path: Path


class HeadFiles:
    """Methods of a :class:`~dph.model.judging.JudgingModel` for heads in directories of their own."""

    def save_head(
        self, directory: str | os.PathLike, name: str | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        """Write one reward head alone: its weights and form, and name and digest of the backbone.

        Args:
            directory: new, or an older head's.
            name: of the head; None if the model has only one.
            about: JSON for its description, in addition to the head's record of its training (``head_records``).

        Raises ValueError for an unknown or untrained head.
        """
        save(self, directory, name, about or {})

    def load_head(self, directory: str | os.PathLike, name: str | None = None, *, force: bool = False) -> str:
        """Add a head that :meth:`save_head` wrote; the backbone is not read again. Return the head's name.

        Args:
            directory: of the head.
            name: that the head gets; None for the one that it was saved with.
            force: take a head that was trained on other weights of a backbone of the same width.

        Raises UserError for a name that the model has already, and for another backbone.
        """
        return load(self, directory, name, force=force)

    def probability(self, rewards: Tensor | Sequence[float], head: str = "default") -> Tensor:
        """Return the probabilities that answers are good, from rewards of any shape by one head.

        They follow the calibration that ``dph card`` has fitted on held-out answers and kept in the head's file:
        sigmoid((reward - midpoint) / temperature).

        Raises ValueError for an unknown or untrained head, and UserError for one without a calibration.
        """
        self.check_heads(head)
        if (fitted := self.head_records.get(head, {}).get("calibration")) is None:
            raise UserError(f"head {head}: expected one with a calibration, which `dph card` fits, got none")
        return torch.sigmoid((torch.as_tensor(rewards).float() - fitted["midpoint"]) / fitted["temperature"])


def head_directories(path: str | os.PathLike) -> list[Path]:
    """Return the directories of heads that a path names: a head's own, or those of a run (``RUN/heads/NAME``)."""
    if Path(path, DESCRIPTION).is_file():
        return [Path(path)]
    return sorted(file.parent for file in Path(path, "heads").glob(f"*/{DESCRIPTION}"))


def backbone_digest(backbone: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Return a digest of a backbone's weights in ``dtype``, the same in every dtype that represents them exactly.

    A model that is read in fp32 from a bf16 file has the digest of the bf16 one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(backbone.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        exact = weight.detach().to("cpu", dtype).to(torch.float32)
        digest.update(exact.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def backbone_digests(backbone: nn.Module) -> dict[str, str]:
    """Return the digests of a backbone's weights, and of them in bf16, as a GPU may read them."""
    return {"digest": backbone_digest(backbone), "bfloat16": backbone_digest(backbone, torch.bfloat16)}


def save(
    model: JudgingModel,
    directory: str | os.PathLike,
    name: str | None,
    about: Mapping[str, Any],
    backbone: str | None = None,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Write one head of a model; see :meth:`Model.save_head`.

    ``backbone`` is the name of the backbone (that of the model if None), ``digests`` its digests if they are computed
    already.
    """
    name, group = find(model, name, "name")
    tensors = {}
    for key, weight in model.heads[group].state_dict().items():
        if not key.startswith("reward.") or key == f"reward.{name}.weight":
            tensors[key] = weight.detach().to("cpu").contiguous()
    description = {
        "format": FORMAT,
        "name": name,
        "form": model.config.head_form(group),
        "hidden_size": model.config.hidden_size,
        "backbone": {
            "name": str(model.name_or_path if backbone is None else backbone),
            **(backbone_digests(model.backbone) if digests is None else digests),
        },
        "about": {**model.head_records.get(name, {}), **about},
    }
    with atomic.new_files(directory, last=DESCRIPTION) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def find(model: JudgingModel, name: str | None, argument: str) -> tuple[str, str]:
    """Return the name of a trained head, the only one if None, and its key in ``model.heads``.

    Raises UserError, which begins with the ``argument``, if there is a choice; ValueError for a missing or untrained
    head.
    """
    if name is None and len(model.head_names) != 1:
        raise UserError(f"{argument}: expected one of {', '.join(model.head_names) or 'the heads'}, got none")
    name = model.head_names[0] if name is None else name
    model.check_heads(name)
    (group,) = (key for key, head in model.heads.items() if name in head.reward)
    return name, group


def load(
    model: JudgingModel,
    directory: str | os.PathLike,
    name: str | None = None,
    *,
    force: bool = False,
    digest: str | None = None,
) -> str:
    """Add a saved head to a model, and return its name; see :meth:`Model.load_head`.

    ``digest`` is the backbone's if it is computed already.
    """
    saved = read(directory)
    name = saved.name if name is None else name
    if name in model.head_names:
        raise UserError(f"name: expected one that the model lacks, got {shown(name)}: give another name")
    if saved.hidden_size != model.config.hidden_size:
        raise UserError(
            f"{directory}: expected a head for states of {model.config.hidden_size} elements, got one for "
            f"{saved.hidden_size}"
        )
    accepted = {saved.backbone["digest"], saved.backbone.get("bfloat16")}
    if not force and (digest or backbone_digest(model.backbone)) not in accepted:
        raise UserError(
            f"{directory}: expected a head of this backbone, got one of {shown(saved.backbone['name'])}, whose weights "
            "are others; force=True takes it nevertheless"
        )
    config = copy.deepcopy(model.config)
    config.task_heads = [*config.task_heads, name]
    config.task_head_forms = {**config.task_head_forms, name: saved.form}
    type(config).from_dict(config.to_dict())  # checks name and form
    head = RewardHead([name], hidden_size=config.hidden_size, **saved.form)
    own, weights = f"reward.{saved.name}.weight", {}
    for key, weight in load_file(saved.path / WEIGHTS).items():
        weights[f"reward.{name}.weight" if key == own else key] = weight
    shapes = {key: list(weight.shape) for key, weight in head.state_dict().items()}
    if (got := {key: list(weight.shape) for key, weight in weights.items()}) != shapes:
        raise UserError(f"{saved.path / WEIGHTS}: expected tensors of shapes {shapes}, got {shown(got)}")
    head.load_state_dict(weights)
    like = next(model.backbone.parameters())
    model.config.task_heads, model.config.task_head_forms = config.task_heads, config.task_head_forms
    model.heads[f"task_{name}"] = head.to(like.device, like.dtype).train(model.training)
    model.head_records[name] = saved.about
    return name


def records_beside(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return ``about`` of the heads' files that a run has written beside its model, RUN/model, by name."""
    if Path(path).name != "model":
        return {}
    saved = map(read, head_directories(Path(path).parent))
    return {head.name: head.about for head in saved}


def update(directory: str | os.PathLike, about: Mapping[str, Any]) -> None:
    """Change fields of ``about`` in the description of a head."""
    path = Path(directory) / DESCRIPTION
    fields = read_json(path)
    fields["about"] |= about
    atomic.write_text(path, json.dumps(fields, indent=2) + "\n")


def read(directory: str | os.PathLike) -> HeadFile:
    """Return the description of a head's directory.

    Raises UserError, which begins with the file, if it is missing, broken or of a later format.
    """
    path = Path(directory)
    where = path / DESCRIPTION
    if not where.is_file():
        got = f"one without {DESCRIPTION}" if path.is_dir() else "a file" if path.exists() else "nothing there"
        raise UserError(f"{path}: expected the directory of a reward head, got {got}")
    fields = read_json(where)
    if fields.get("format") != FORMAT:
        raise UserError(f"{where}: format: expected {FORMAT}, got {shown(fields.get('format'))}")
    for key, kind in (("name", str), ("form", dict), ("hidden_size", int), ("backbone", dict), ("about", dict)):
        if not isinstance(fields.get(key), kind):
            raise UserError(f"{where}: {key}: expected a {kind.__name__}, got {shown(fields.get(key))}")
    if set(fields["form"]) - {"members"} != set(FORM):
        raise UserError(f"{where}: form: expected {', '.join(FORM)}, got {shown(sorted(fields['form']))}")
    if not all(isinstance(fields["backbone"].get(key), str) for key in ("name", "digest")):
        raise UserError(f"{where}: backbone: expected name and digest, got {shown(fields['backbone'])}")
    names = ("name", "form", "hidden_size", "backbone", "about")
    return HeadFile(*(fields[name] for name in names), path)
