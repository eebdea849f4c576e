"""lm-evaluation-harness from its command line, on a task of our own."""

import json
import subprocess
import sys

from helpers.texts import write_lines
from helpers.two import environment


def samples(tmp_path, module, arguments, *documents):
    """Run the command line of ``module`` on documents with the fields q, c and a; the lines of its samples."""
    write_lines(tmp_path / "documents.jsonl", *documents)
    task = {
        "task": "mini", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "documents.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "mini.yaml").write_text(json.dumps(task))
    command = [sys.executable, "-m", module, "run", "--tasks", "mini", "--include_path", str(tmp_path), *arguments]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    own = environment(HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=own, cwd=tmp_path)
    files = list((tmp_path / "out").rglob("samples_mini_*.jsonl"))
    assert files, done.stderr
    return list(map(json.loads, files[0].read_text().splitlines()))
