"""LaProp on shards: FSDP2 over two processes on the CPU (sharded.py), one of which has empty shards."""

from helpers.two import needs_gloo, run_both


@needs_gloo
def test_two_processes_train_one_model(tmp_path):
    """Steps, clipping by the norm of all shards, a bad gradient on one rank, checkpoints, and what is refused."""
    run_both("sharded.py", tmp_path, timeout=100)
