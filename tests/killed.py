"""Kills training with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed run.

    python tests/killed.py --kills 20 FOLDER            # a run of the quickstart's size, with Transformer-XL memory

Exits with 0 where every weight is the same, bit for bit.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from dph import puzzles, tokenizer

MODEL = "{embedding_size: 64, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4}"


def material(folder):
    """Conversations and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    with (folder / "chats.jsonl").open("w") as file:
        for puzzle in itertools.islice(puzzles.puzzles(0), 5000):
            answer = {"role": "assistant", "content": puzzles.corpus_answer(puzzle, rng)}
            file.write(json.dumps({"messages": [*puzzle.question(), answer]}) + "\n")
    texts = (puzzle.prompt for puzzle in itertools.islice(puzzles.puzzles(1), 500))
    tokenizer.from_iterator(texts, 300).save_pretrained(folder / "tokenizer")


def command(folder, name, steps):
    return [
        sys.executable, "-m", "dph.cli", "train", "mini-sft", "--resume", f"--output={folder / name}",
        f"model={{config: {MODEL}, tokenizer: {folder / 'tokenizer'}}}", f"data.sources=[{folder / 'chats.jsonl'}]",
        f"optimiser.steps={steps}", "output.save_every=7", "output.log_every=10", "device=cpu",
    ]  # fmt: skip


def run(folder, name, steps):
    """Train to the end; the seconds that it took."""
    began = time.monotonic()
    subprocess.run(command(folder, name, steps), check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def killed(folder, steps, kills, seconds):
    """Kill as often as told, each time after up to ``seconds``, then let it end. How many kills met a process."""
    rng, met = random.Random(0), 0
    for _ in range(kills):
        with subprocess.Popen(command(folder, "killed", steps), stderr=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0, seconds))
            met += process.poll() is None
            process.kill()
    run(folder, "killed", steps)
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    material(options.folder)
    seconds, start = (run(options.folder, "whole", options.steps) for _ in range(2))  # a finished run but starts
    met = killed(options.folder, options.steps, options.kills, start + 2 * (seconds - start) / options.kills)
    whole, parts = (load_file(options.folder / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    same = whole.keys() == parts.keys() and all(torch.equal(t, parts[name]) for name, t in whole.items())
    figures = [(options.folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    print(f"{met} of {options.kills} kills met a run of {seconds:.0f} s; {len(figures[0])} and {len(figures[1])} lines")
    return 0 if same and len(figures[0]) == len(figures[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
