"""``dph convert``: a model in another layout: own, released, or a family's own."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dph.cli import common
from dph.data import atomic
from dph.errors import UserError, printable

if TYPE_CHECKING:
    from dph.model.model import Model

HELP = "turn a model or a run's checkpoint into the own format, a family's own (Llama, Qwen, ...), or the released one"
EXAMPLE = """dph convert released-model own-model --to own
dph convert runs/align/checkpoints/step-00004096 best --to own
dph convert runs/align/model SmolLM2-aligned --to hf
dph convert runs/head/model SmolLM2-reward --to classifier"""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph convert``."""
    parser.add_argument(
        "input", metavar="IN", help="model directory, hub name, or a run's checkpoint (RUN/checkpoints/step-NNNNNNNN)"
    )
    parser.add_argument("output", metavar="OUT", help="directory to write; must be new or empty")
    parser.add_argument(
        "--to",
        required=True,
        choices=("own", "hf", "classifier", "official"),
        help="layout of OUT: own; hf, that of the family which the model comes from, for its class in transformers; "
        "classifier, the same with one reward head, for AutoModelForSequenceClassification without dph "
        "(dph.model.classifier); or official, that of lsw_transformer",
    )
    parser.add_argument("--head", help="head of a classifier: its name, or its directory (default: the only one)")


def run(args: argparse.Namespace) -> None:
    """Write weights and configuration in another layout, and the tokenizer's files.

    They are copied unchanged, but for the names of the chat tokens in the official layout.
    """
    from dph.model.directories import MANIFEST, model_path

    is_checkpoint = (Path(args.input) / MANIFEST).is_file()
    source = args.input if is_checkpoint else model_path(args.input)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a new or empty directory, got a file there")
    if output.exists() and not all(map(atomic.is_temporary, output.iterdir())):
        raise UserError(f"{output}: expected a new or empty directory, got one that exists with files in it")
    atomic.check_new_files(output)

    from dph.model.loading import check_settings, check_tokenizer, load_tokenizer
    from dph.train.build import open_checkpoint

    if is_checkpoint:
        model, tokenizer = open_checkpoint(source)
    else:
        check_settings(source)  # of the tokenizer, whose files are copied
        model, tokenizer = _load_with_trained_heads(source), None
    if args.to == "classifier":
        if tokenizer is None:
            tokenizer = load_tokenizer(source)
        check_tokenizer(model, tokenizer)
    elif args.head is not None:
        raise UserError(f"--head: expected none with --to {args.to}, got {args.head}")
    parameters = model.num_parameters()
    with atomic.new_files(output, last="config.json") as folder:
        if args.to == "own":
            model.save_pretrained(folder)
        elif args.to == "hf":
            model.save_family(folder)
            parameters -= sum(weight.numel() for weight in model.heads.parameters())
        elif args.to == "classifier":
            _save_classifier(model, tokenizer, folder, args.head)
        else:
            model.save_official(folder)
        if tokenizer is None and Path(source).is_dir():
            copied = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
            for name in copied:
                shutil.copyfile(Path(source) / name, folder / name)
        else:
            if tokenizer is None:
                tokenizer = load_tokenizer(source)
            copied = [Path(name).name for name in tokenizer.save_pretrained(folder)]
        if args.to == "official" and copied:
            _name_chat_tokens(folder)
    copied_names = ", ".join(copied) or "none"
    common.print_text(f"{output}: {parameters:,} parameters, tokenizer files: {copied_names}")


def _name_chat_tokens(folder: Path) -> None:
    """Name the chat tokens in a tokenizer's settings as the paper's evaluation expects them.

    A tokenizer without chat tokens, as that of a pre-trained model, stays as it is.
    """
    from dph import chat
    from dph._folder import read_json
    from dph.model.loading import load_tokenizer

    names = {"cls_token": chat.END, "sep_token": chat.START}
    if not set(names.values()) <= load_tokenizer(str(folder)).get_vocab().keys():
        return
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.exists() and (fields := read_json(file)) | names != fields:
            file.write_text(json.dumps(fields | names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_classifier(model: Model, tokenizer: Any, folder: Path, head: str | None) -> None:
    """Write a classifier without its tokenizer, and print which class opens it."""
    from dph.model.classifier import save_classifier

    if head is not None:
        names = common.add_heads(model, head)
        if len(names) > 1:
            raise UserError(f"--head: expected one head, got a run of {', '.join(names)}: give {head}/heads/NAME")
        head = names[0]
    try:
        name = save_classifier(model, tokenizer, folder, head)
    except ValueError as error:
        raise UserError(str(error)) from None
    needs = ", with trust_remote_code=True" if name == "RewardClassifier" else ""
    common.print_text(f"AutoModelForSequenceClassification opens it as {name}{needs}; texts end with the end of turn")


def _load_with_trained_heads(source: str) -> Model:
    """Return the model without heads that lack weights, so that untrained heads do not pass for trained ones."""
    from dph.model.loading import load_model

    model = load_model(source)
    if not model.untrained_heads:
        return model
    trained = {}
    for key in ("reward_heads", "task_heads"):
        trained[key] = [name for name in getattr(model.config, key) if name not in model.untrained_heads]
    forms = model.config.task_head_forms
    trained["task_head_forms"] = {name: form for name, form in forms.items() if name not in model.untrained_heads}
    names = ", ".join(sorted(model.untrained_heads))
    print(printable(f"reward heads without weights are left out: {names}"), file=sys.stderr)
    return load_model(source, **trained)
