"""Reward heads on a frozen model, from raw files to a table of what they are worth.

For each set PREFS/NAME.jsonl ({prompt, chosen, rejected}) a fifth of the prompts is held out. Heads of several seeds
are trained on the others by the recipe ``head`` (``dph train head``), which keeps a tenth of its prompts to choose the
step; the frozen states are computed once for all seeds. On the held-out prompts the table has the share of pairs in
which the chosen answer scores higher, by

    reward      the head of each seed
    sum, mean   summed and mean log-probability of the model itself
    surface     logistic regression on words, pairs of words and length of the answer: what needs no understanding

and, if there is RERANK/NAME.jsonl ({prompt, candidates, correct}), the share of right answers when one of N candidates
is chosen at random, as the most probable (mean log-probability), by reward, by a vote, and by an oracle.

Multiple-choice tasks (DIR/TASK/SPLIT.jsonl, in the hub's fields) train heads on their training part, and have the share
of right answers, or the task's own metric, on the validation part; where there is none, on a fifth of the records.

    python examples/real_heads.py MODEL --prefs DIR --rerank DIR --sets truthfulqa_human gsm8k --output runs/real
    python examples/real_heads.py MODEL --directory DIR --tasks arc/easy glue/sst2 --limit 1500 --output runs/real
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dph import chat, tasks
from dph.data.atomic import write_text
from dph.data.candidates import Candidates, read_candidates
from dph.data.dataset import task_documents
from dph.data.formats import Conversation, Preference, parse_record
from dph.data.json_lines import read_jsonl
from dph.data.sampler import draw
from dph.data.sources import prompt_key
from dph.evaluate import best_of
from dph.evaluate.choices import evaluate, prefer
from dph.evaluate.tables import table
from dph.model.loading import load_model, load_tokenizer
from dph.train import recipe
from dph.train.entry import train

SHARE = 0.2  # of the prompts that are held out
RERANK = {"truthfulqa_human": "truthfulqa"}  # name of a set's candidates, if it is another


def main() -> None:
    """Train and judge every set, print the tables, and write them with all figures to OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="directory or hub name")
    parser.add_argument("--prefs", type=Path, metavar="DIR", help="folder of NAME.jsonl with pairs")
    parser.add_argument("--rerank", type=Path, metavar="DIR", help="folder of NAME.jsonl with candidates")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME", help="preference sets of --prefs")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="folder of TASK/train.jsonl, and validation.jsonl"
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="tasks of --directory")
    parser.add_argument(
        "--limit", type=int, default=1500, metavar="N", help="training records of a task (default: 1500)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="seeds 0 to K - 1 (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/real"), metavar="DIR", help="runs, heads and tables")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the recipe head")
    args = parser.parse_args()
    if (args.sets and args.prefs is None) or (args.tasks and args.directory is None):
        parser.error("--sets needs --prefs, --tasks needs --directory")
    tokenizer, pairs, choices, answers = load_tokenizer(args.model), [], [], []
    for name in args.sets:
        rows = list(read_jsonl(args.prefs / f"{name}.jsonl"))
        records = [parse_record(row, "preference", f"{name}: record {i}") for i, row in enumerate(rows)]
        held_out = [is_held_out(record) for record in records]
        source = args.output / name / "train.jsonl"
        write_rows(source, [row for row, held in zip(rows, held_out, strict=True) if not held])
        model = with_heads(args, name, f"data.sources=[{source}]")
        kept = [record for record, held in zip(records, held_out, strict=True) if held]
        train_records = [record for record, held in zip(records, held_out, strict=True) if not held]
        pairs += judge_pairs(name, model, tokenizer, kept, surface_margins(train_records, kept))
        candidates = None if args.rerank is None else args.rerank / f"{RERANK.get(name, name)}.jsonl"
        if candidates is not None and candidates.is_file():
            choices += judge_candidates(name, model, tokenizer, read_candidates(candidates))
        show(args.output, pairs, choices, answers)
    for name in args.tasks:
        answers += judge_task(args, name, tokenizer)
        show(args.output, pairs, choices, answers)


def is_held_out(record: Preference | Conversation) -> bool:
    """Whether a record's prompt is held out, the same in every run."""
    return draw(2**32, "held out", prompt_key(record)) < SHARE * 2**32


def judge_task(args: argparse.Namespace, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Train heads on a task, and return its metrics on held-out records, by log-probability and by each head."""
    data = args.output / name / "data"
    copy_task(args.directory / name, data / name)
    sources = f"data.sources=[{{source: 'task:{name}', directory: {data}, limit: {args.limit}}}]"
    model, task = with_heads(args, name, sources), tasks.load(name)
    documents = tqdm(task_documents(task, "validation", data), name, disable=None)
    rows = []
    for row in evaluate(model, tokenizer, task, documents, head=model.head_names, max_tokens=8192).rows:
        for metric, interval in row.metrics.items():
            if interval is not None:
                rows.append({"task": name, "n": row.n, "rule": row.method, "metric": metric, **vars(interval)})
    return rows


def copy_task(source: Path, target: Path) -> None:
    """Copy a task's training and validation records; without the latter, hold out a fifth of the former."""
    rows = {
        split: list(read_jsonl(source / f"{split}.jsonl"))
        for split in ("train", "validation")
        if (source / f"{split}.jsonl").is_file()
    }
    if "validation" not in rows:
        held_out = [draw(2**32, "held out", json.dumps(row, sort_keys=True)) < SHARE * 2**32 for row in rows["train"]]
        rows["validation"] = [row for row, held in zip(rows["train"], held_out, strict=True) if held]
        rows["train"] = [row for row, held in zip(rows["train"], held_out, strict=True) if not held]
    for split, kept in rows.items():
        write_rows(target / f"{split}.jsonl", kept)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON lines, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def with_heads(args: argparse.Namespace, name: str, sources: str) -> Any:
    """Return the model with a head of each seed that learns from ``sources``; what was trained before is read.

    Later seeds take the layer, or the mix, that the first one has chosen, and so its cached states.
    """
    folder, model, chosen = args.output / name, load_model(args.model), []
    for seed in range(args.seeds):
        run, head = folder / f"seed{seed}", folder / f"head{seed}"
        if not head.is_dir():
            changes = [f"model.path={args.model}", sources, f"output.directory={run}", f"seed={seed}"]
            settings = recipe.load("head", [*changes, f"data.cache={folder / 'cache'}", *chosen, *args.override])
            train(settings, resume=run.is_dir()).model.save_head(head, about={"set": name, "seed": seed})
        model.load_head(head, f"seed{seed}")
        chosen = chosen or [f"objective.layer={model.config.head_form(f'task_seed{seed}')['layer']}"]
    return model


def judge_pairs(
    name: str, model: Any, tokenizer: Any, records: Sequence[Preference], surface: np.ndarray
) -> list[dict[str, Any]]:
    """Return the share of held-out pairs in which the chosen answer scores higher, by each rule."""
    groups = []
    for record in tqdm(records, f"{name}: pairs", disable=None):
        groups.append([chat.encode(side, tokenizer, last_only=True) for side in (record.chosen, record.rejected)])
    judged, found = model.judge(groups, max_tokens=8192), {}
    for head in model.head_names:
        found[f"reward, {head}"] = [group.rewards[head] for group in judged]
    found["sum"] = [group.logprobs for group in judged]
    found["mean"] = [group.mean_logprobs for group in judged]
    found["surface"] = np.stack([surface, np.zeros(len(surface))], 1)
    rows = []
    for rule, scores in found.items():
        chosen, rejected = zip(*scores, strict=True)
        agreement = prefer(rule, chosen, rejected).accuracy
        rows.append({"set": name, "n": len(records), "rule": rule, **vars(agreement)})
    return rows


def surface_margins(train_records: Sequence[Preference], held_out: Sequence[Preference]) -> np.ndarray:
    """Return how much more likely the chosen answers of held-out pairs are, by words, word pairs and length alone."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def answers(records: Sequence[Preference], side: str) -> list[str]:
        return [getattr(record, side)[-1]["content"] for record in records]

    words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\S+", min_df=2)
    words.fit(answers(train_records, "chosen") + answers(train_records, "rejected"))

    def features(texts: list[str]) -> Any:
        lengths = [[len(text) / 100, len(text.split()) / 20, np.log1p(len(text))] for text in texts]
        return hstack([words.transform(texts), csr_matrix(lengths)]).tocsr()

    def differences(records: Sequence[Preference]) -> Any:
        return features(answers(records, "chosen")) - features(answers(records, "rejected"))

    own = differences(train_records)
    signs = np.where(np.arange(own.shape[0]) % 2, 1, -1)  # both classes, for the library
    fitted = LogisticRegression(fit_intercept=False, C=0.1, max_iter=1000).fit(own.multiply(signs[:, None]), signs)
    return fitted.decision_function(differences(held_out))


def judge_candidates(name: str, model: Any, tokenizer: Any, rows: Sequence[Candidates]) -> list[dict[str, Any]]:
    """Return the share of right answers among the chosen ones of N candidates, for N from 1 to all."""
    kept = [row for row in rows if is_held_out(Conversation(row.conversations[0]))]
    groups = (row.encode(tokenizer) for row in tqdm(kept, f"{name}: candidates", disable=None))
    prompts = []
    for row, judged in zip(kept, model.judge(groups, max_tokens=8192), strict=True):
        prompts.append(
            best_of.scored(row.texts, row.correct, {"most probable": judged.mean_logprobs, **judged.rewards})
        )
    found = []
    for curve in best_of.curves(prompts, best_of.words, {}):
        for n, figure in zip(curve.ns, curve.right, strict=True):
            found.append({"set": name, "n": n, "prompts": curve.prompts, "rule": curve.rule, **vars(figure)})
    return found


def show(output: Path, *figures: Sequence[dict[str, Any]]) -> None:
    """Print the tables of pairs, candidates and tasks, and write them to the folder ``output``."""
    columns = {
        "pairs": {"pairs": "set", "held out": "n", "rule": "rule", "accuracy": "value"},
        "candidates": {"candidates": "set", "prompts": "prompts", "N": "n", "rule": "rule", "right": "value"},
        "tasks": {"task": "task", "held out": "n", "rule": "rule", "metric": "metric", "value": "value"},
    }
    texts = []
    for fields, rows in zip(columns.values(), figures, strict=True):
        cells = [[*(row[key] for key in fields.values()), f"{row['low']:.3f} to {row['high']:.3f}"] for row in rows]
        if cells:
            texts.append(table([*fields, "95% interval"], cells))
    print(*texts, sep="\n\n")
    write_text(output / "tables.txt", "\n\n".join(texts) + "\n")
    write_text(output / "figures.json", json.dumps(dict(zip(columns, figures, strict=True)), indent=1))


if __name__ == "__main__":
    main()
