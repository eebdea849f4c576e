"""``dph score``: rewards and log-probabilities of conversations and preferences."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dph.cli import cluster, common, results
from dph.errors import UserError, shown_names

if TYPE_CHECKING:
    from dph.chat import Encoded, Message
    from dph.data.rows import SourceRows
    from dph.model.judging import Judged

HELP = "rewards and log-probabilities of conversations, and how often they prefer the chosen answer of a pair"
EXAMPLE = """dph score runs/align conversations.jsonl --json
dph score runs/align preferences.jsonl --output scores.jsonl
dph score runs/align preferences.jsonl --output scores.jsonl --resume
dph score runs/align preferences.jsonl --output scores --ray local --workers 4
dph score runs/align '{source: answers.csv, columns: {prompt: question, completion: answer}, limit: 100}'
dph score MODEL preferences.jsonl --head runs/helpful --head runs/harmless"""
WITHOUT_HEAD = "--logprob-only needs no rewards"
SIDES = ("chosen", "rejected")
TITLES = {"reward": "reward", "logprob": "log-probability (sum)", "mean_logprob": "log-probability (mean)"}

# Keys of TITLES, "spread" of an ensemble, and reward_NAME and spread_NAME of several heads, with their values;
# log-probabilities in nats, None for the mean of an empty answer.
Scores = dict[str, float | None]
# Scores of a conversation, or by SIDES those of a pair.
Scored = Scores | dict[str, Scores]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``dph score``."""
    parser.description = f"""{HELP}.

The sum is the log-probability of the final answer, its end-of-turn token included, in nats. The mean is per content
token and leaves out the end-of-turn token; an empty answer has none (-). A line with chosen and rejected is a pair, any
other a conversation. The output has the fields of each line, and its scores in the field of --field."""
    common.add_model(parser)
    parser.add_argument(
        "file",
        metavar="CONVERSATIONS",
        help="rows with messages, prompt and completion, or chosen and rejected (TRL's forms): " + common.SOURCE,
    )
    results.add_output(parser, "every line with its scores")
    common.add_field(parser, "scores")
    common.add_judging(parser)
    common.add_json(parser)
    cluster.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line per conversation, and a summary of preferences; write every line to ``--output``."""
    args = cluster.prepared(args)
    scored: list[Scored] = []
    prompts: list[Hashable] = []
    quiet = args.json and sys.stdout.isatty()  # a bar would mix with the lines
    with cluster.written(open_job(args), args, quiet) as lines:
        for written in lines:
            scored.append(written[args.field])
            prompts.append(_prompt(written, len(prompts)))
            if args.json and not _is_pair(written[args.field]):
                common.print_json(written, flush=True)
    _report(scored, prompts, args.json)


def open_job(args: argparse.Namespace) -> results.Job:
    """Check the conversations, open the model, and return the job that scores them."""
    source, options = common.parse_source(args.file)
    cluster.check_output(args, source)

    from dph.data.files import report_ignored
    from dph.data.rows import open_source, text_options

    form, ignored = text_options(**options), set[str]()

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        def check(number: int, fields: Mapping[str, Any]) -> None:
            alternatives(fields, f"{place}{number}", **form, ignored=ignored)

        return check

    added = args.field if args.json or args.output is not None else None
    lines = open_source(source, visit, added=added, **options)  # an error now rather than when the line's turn comes
    report_ignored(source, ignored - options.get("filter", {}).keys())
    common.check_model(args)

    model, tokenizer, heads = common.open_model(args, common.heads_of(args), WITHOUT_HEAD)
    about = {"command": "score", "input": lines.fingerprint(), "field": args.field}
    if args.output is not None:
        about |= results.about_model(model, tokenizer, heads)

    def line(index: int, judged: Judged) -> dict[str, Any]:
        return {**lines[index], args.field: _scores(judged, heads, lines.location(index))}

    groups = _encoder(lines, form, tokenizer)
    return results.judging("score", len(lines), model, groups, line, lines.location, about)


def alternatives(
    fields: Mapping[str, Any],
    where: str,
    text_field: str = "text",
    rendered: bool = False,
    ignored: set[str] | None = None,
) -> list[list[Message]]:
    """Return the conversation of a line, or the two of a pair, the chosen one first; each ends in the answer to judge.

    Args:
        fields, where, text_field, rendered, ignored: see ``dph.data.formats.parse_record``.

    Raises UserError, which begins with ``where``, for fields that are neither. Whether an answer is good to learn
    (``label``, ``labels``, ``weight``) plays no part.
    """
    from dph import chat
    from dph.data.conversions import own_fields
    from dph.data.formats import answer_form, parse_record

    fields = own_fields(_without_marks(fields), where, with_tools=True)
    options: dict[str, Any] = {"text_field": text_field, "rendered": rendered, "ignored": ignored}
    form = answer_form(fields)
    if form is None and rendered and fields.get(text_field) is not None:
        form = "conversation"
    if form == "preference":
        pair = parse_record(fields, "preference", where, **options)
        return [pair.chosen, pair.rejected]
    if form is None:
        forms = "messages, prompt and completion, or chosen and rejected"
        raise UserError(f"{where}: expected {forms}, got the fields {shown_names(fields)}")
    messages = parse_record(fields, "conversation", where, **options).messages
    chat.check_final_answer(messages, where)
    return [messages]


def _without_marks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without what marks its answer as good or bad to learn, also in messages."""
    from dph.data.conversions import TRAIN_FLAGS

    row = {}
    for name, value in fields.items():
        if isinstance(value, list):
            value = [_without_marks(item) if isinstance(item, Mapping) else item for item in value]
        if name not in ("label", "labels", *TRAIN_FLAGS):
            row[name] = value
    return row


def _encoder(lines: SourceRows, form: Mapping[str, Any], tokenizer: Any) -> Callable[[int], Iterator[list[Encoded]]]:
    """Return a function that yields the encoded alternatives of each line from an index on."""
    from dph import chat

    def groups(start: int) -> Iterator[list[Encoded]]:
        for i in range(start, len(lines)):
            where = lines.location(i)
            try:
                yield [
                    chat.encode(messages, tokenizer, last_only=True)
                    for messages in alternatives(lines.fields(i), where, **form)
                ]
            except UserError as error:
                raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error

    return groups


def _title(key: str) -> str:
    """Return the title of a score; that of ``reward_NAME`` is "reward NAME"."""
    return TITLES.get(key, key.replace("_", " ", 1))


def _scores(judged: Judged, heads: Sequence[str], where: str) -> Scored:
    """Return the scores of a line: ``reward``, or ``reward_NAME`` for each of several heads, and log-probabilities.

    A head that is an ensemble has a ``spread``, too: the standard deviation over its members.

    Raises RuntimeError, which begins with ``where``, for a score that is no finite number.
    """
    from dph.evaluate.metrics import check_finite

    scores = []
    for i, logprob in enumerate(judged.logprobs):
        one: Scores = {}
        for head in heads:
            suffix = "" if len(heads) == 1 else f"_{head}"
            one[f"reward{suffix}"] = judged.rewards[head][i]
            if head in judged.spreads:
                one[f"spread{suffix}"] = judged.spreads[head][i]
        one["logprob"] = logprob
        one["mean_logprob"] = judged.mean_logprobs[i]
        for key, value in one.items():
            check_finite([] if value is None else [value], f"{where}: {_title(key)}")
        scores.append(one)
    return scores[0] if len(scores) == 1 else dict(zip(SIDES, scores, strict=True))


def _is_pair(scored: Scored) -> bool:
    return SIDES[0] in scored


def _prompt(row: Mapping[str, Any], number: int) -> Hashable:
    """Return what pairs of the same prompt share: the prompt of a row, else the row's number."""
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("chosen"), list):
        prompt = row["chosen"][:-1]
    return number if prompt is None else json.dumps(prompt, sort_keys=True, default=str)


def _report(scored: Sequence[Scored], prompts: Sequence[Hashable], as_json: bool) -> None:
    """Print a table of the conversations, and how often each score prefers the chosen answer of the pairs."""
    from dataclasses import asdict

    from dph.evaluate.choices import prefer
    from dph.evaluate.tables import table

    conversations = [[i, *scores.values()] for i, scores in enumerate(scored) if not _is_pair(scores)]
    pairs = [scores for scores in scored if _is_pair(scores)]
    of_pairs = [prompt for prompt, scores in zip(prompts, scored, strict=True) if _is_pair(scores)]
    keys = pairs[0][SIDES[0]] if pairs else scored[0]
    if conversations and not as_json:
        print(table(["record", *map(_title, keys)], conversations))
    if conversations and pairs and not as_json:
        print()
    rows = []
    for key in keys if pairs else ():
        if key.startswith("spread"):
            continue
        columns = ([pair[side][key] for pair in pairs] for side in SIDES)
        rows.append(prefer(_title(key), *columns, prompts=of_pairs))
    if as_json:
        for row in rows:
            common.print_json(asdict(row))
    elif rows:
        cells = []
        for row in rows:
            accuracy = [None, None] if row.accuracy is None else [row.accuracy.value, row.accuracy.range]
            margin = None if row.margin is None else f"{row.margin:.3g}"  # rewards may be very small
            cells.append([row.method, *accuracy, margin, row.ties, row.n])
        print(table(["method", "pair accuracy", "95% interval", "mean margin", "ties", "n"], cells))
