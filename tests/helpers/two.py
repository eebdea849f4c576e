"""Two processes that train together: gloo, started here in an environment like torchrun's."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZE = 2
NO_GLOO = 77  # the exit code of a process that finds no other
HERE = Path(__file__).parent

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)


def environment(**more):
    """One that finds the packages and the tests, with one thread."""
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def run_both(script, *arguments, timeout):
    """Run ``script`` of this folder twice, to its end; skip where the two cannot find each other."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    names |= {"WORLD_SIZE": f"{SIZE}", "LOCAL_WORLD_SIZE": f"{SIZE}"}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env=environment(**names, RANK=f"{rank}", LOCAL_RANK=f"{rank}"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if NO_GLOO in [process.returncode for process in started]:
        pytest.skip(f"gloo does not work here: {' / '.join(text.strip() for text in said)}")
    assert [process.returncode for process in started] == [0] * SIZE, "\n".join(said)


@contextlib.contextmanager
def meeting():
    """End this process with NO_GLOO and the reason where the other one cannot be found."""
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises
        print(str(error).splitlines()[0])
        sys.exit(NO_GLOO)
