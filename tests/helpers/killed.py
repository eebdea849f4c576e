"""Kills training with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed run.

    python tests/helpers/killed.py --kills 20 FOLDER    # a run of the quickstart's size, with Transformer-XL memory

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

from dph.data import tokenizer
from dph.demo import puzzles

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
        f"optimiser.steps={steps}", "output.save_every=7", "output.log_every=1", "device=cpu",
    ]  # fmt: skip


def run(folder, name, steps):
    """Train to the end; the seconds that it took."""
    began = time.monotonic()
    subprocess.run(command(folder, name, steps), check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def logged(folder, name):
    """The last step that a run has logged; 0 before the first."""
    path = folder / name / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in whole), default=0)


def killed(folder, steps, kills):
    """Kill as often as told, each time somewhere in a stretch of the run of its own, then let it end.

    A stretch is waited for by what the run has logged, so that every kill meets a process, however fast the machine is;
    the moment in it is random, and before it the process may be starting, saving or cleaning up. How many did meet one.
    """
    rng, met, stretch = random.Random(0), 0, steps / (kills + 1)
    for kill in range(kills):
        target = int(stretch * (kill + rng.random()))
        with subprocess.Popen(command(folder, "killed", steps), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and logged(folder, "killed") < target:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05))
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
    seconds = run(options.folder, "whole", options.steps)
    met = killed(options.folder, options.steps, options.kills)
    whole, parts = (load_file(options.folder / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    same = whole.keys() == parts.keys() and all(torch.equal(t, parts[name]) for name, t in whole.items())
    figures = [(options.folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    print(f"{met} of {options.kills} kills met a run of {seconds:.0f} s; {len(figures[0])} and {len(figures[1])} lines")
    return 0 if same and len(figures[0]) == len(figures[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
