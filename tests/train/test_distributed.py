"""Two processes train as one does: gloo on the CPU (parallel_runs.py), and torchrun with the command line."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.killed import MODEL, material
from helpers.parallel_runs import CASES, RESUMED, data_of, recipe_of
from helpers.stages import figures, go, records, tiny, weights
from helpers.texts import small_tokenizer
from helpers.two import SIZE, environment, needs_gloo, run_both
from safetensors.torch import load_file

import dph
from dph.cli import main
from dph.errors import OtherRankFailed, UserError
from dph.train import build, checkpointing, distributed, entry
from dph.train.budget import memory
from dph.train.distributed import World

RATE = 1e-6  # of the largest weight: how far two processes may be from one

THREADS_AT_END = """
import atexit, pathlib, sys
from dph.cli.main import main
threads = pathlib.Path("/proc/self/task")
atexit.register(lambda: print(*[(thread / "comm").read_text() for thread in threads.glob("*")]))  # runs last
sys.exit(main())
"""

pytestmark = [needs_gloo, pytest.mark.usefixtures("every_kernel")]


def command(folder, name, steps):
    """Training of a small model on conversations, by the command line."""
    return [
        sys.executable, "-m", "dph.cli", "train", "mini-sft", "--resume", f"--output={folder / name}",
        f"model={{config: {MODEL}, tokenizer: {folder / 'tokenizer'}}}", f"data.sources=[{folder / 'messages.jsonl'}]",
        f"optimiser.steps={steps}", "output.save_every=7", "output.log_every=1", "device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes left."""
    found = tmp_path_factory.mktemp("parallel")
    run_both("parallel_runs.py", found, "cpu", timeout=400)
    return found


def noted(folder, name):
    """What each process found."""
    return [json.loads((folder / "found" / f"{name}-{rank}.json").read_text()) for rank in range(SIZE)]


def trained(folder, name):
    """The weights that both processes have, which are the same bit for bit."""
    first, *others = (load_file(folder / "found" / f"{name}-{rank}.safetensors") for rank in range(SIZE))
    assert all(torch.equal(t, other[name]) for other in others for name, t in first.items())
    return first


def assert_near(found, expected, rate=RATE):
    limit = rate * max(float(p.abs().max()) for p in expected.values())
    for name, p in expected.items():
        assert float((found[name] - p).abs().max()) <= limit, name


def one_process(name, directory, **more):
    """The same case by one process."""
    stage, changes, model = CASES[name]
    return go(recipe_of(stage, directory, **changes, **more), data_of(name), model=tiny(**model))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("bf16")])
def test_two_processes_train_as_one(name, folder, tmp_path):
    """Weights and figures, with clipping; and what lies on the disk is one process's."""
    result = one_process(name, tmp_path / "one")
    assert_near(trained(folder, name), weights(result.model))
    lines = figures(tmp_path / "one")
    assert max(line.get("grad_norm", 0.0) for line in lines) > 0.2, "clipping is meant to be active"
    for one, two in zip(lines, figures(folder / name), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert noted(folder, name)[0]["evaluation"] == pytest.approx(result.evaluation, rel=1e-5)
    saved = dph.Model.from_pretrained(folder / name / "model")
    assert all(torch.equal(p, trained(folder, name)[key]) for key, p in saved.named_parameters())
    assert len(list((folder / name / "tensorboard").iterdir())) == 1
    assert not list((folder / name).glob(".*")), "nothing half written stays"
    assert files(folder / name) - {"data-00001.safetensors"} == files(tmp_path / "one")


def files(directory):
    """Of a run; what the cache holds has names that no two processes give."""
    found = [path for path in directory.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {path.name for path in found if "tfevents" not in path.name}


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("bf16")])
def test_two_processes_in_bf16(name, folder, tmp_path):
    """bf16 rounds partial sums; the frozen model is the same one, bit for bit, by the name of its cache."""
    before = weights(tiny())
    after, found = weights(one_process(name, tmp_path / "one").model), trained(folder, name)
    moved = max(float((after[key] - p).abs().max()) for key, p in before.items())
    assert_near(found, after, 0.1 * moved)
    assert all(p.dtype == torch.float32 for p in found.values())
    if name.startswith("head"):
        assert all(torch.equal(found[key], p) for key, p in before.items() if not key.startswith("heads."))
    assert {path.name for path in (folder / name / "cache").iterdir()} == {
        path.name for path in (tmp_path / "one" / "cache").iterdir()
    }


@pytest.mark.parametrize("stage", RESUMED)
def test_two_then_one_then_two(stage, folder, tmp_path):
    """SIGTERM in one process stops both after the same step; one process goes on, in other parts, then two again."""
    first, second = noted(folder, f"struck-{stage}")
    assert first == second
    assert first["interrupted"]
    steps = sorted(checkpointing.newest_checkpoint(folder / f"resumed-{stage}" / "checkpoints").path.parent.iterdir())
    assert [checkpointing.damage(path) for path in steps] == [None] * 3  # the last one is saved at the end
    numbers = [int(path.name.removeprefix("step-")) for path in steps]
    assert [numbers[0], numbers[2]] == [first["step"], 8]
    assert numbers[0] < numbers[1] < 8
    assert (steps[0] / "data-00001.safetensors").exists() == (stage == "sft")
    assert not (steps[1] / "data-00001.safetensors").exists()
    whole = go(recipe_of(stage, tmp_path / "whole"))
    assert_near(trained(folder, f"resumed-{stage}"), weights(whole.model))
    for one, two in zip(figures(tmp_path / "whole"), figures(folder / f"resumed-{stage}"), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_nan_in_one_process_is_skipped_in_both(folder):
    saved = [
        checkpointing.Checkpoint(n, folder / "nan" / "checkpoints" / f"step-{n:08}").tensors("weights")
        for n in (4, 5, 6)
    ]
    assert all(torch.equal(t, saved[1][name]) for name, t in saved[0].items())
    assert not all(torch.equal(t, saved[2][name]) for name, t in saved[0].items())
    assert [line["skipped"] for line in figures(folder / "nan")] == [0] * 4 + [1] * 4
    assert_near(trained(folder, "nan"), load_file(folder / "nan" / "model" / "model.safetensors"), 0.0)


def test_an_error_of_the_data_of_one_process_is_saved_by_both(folder, tmp_path):
    found = noted(folder, "data-error")
    assert [each["kind"] for each in found] == ["OtherRankFailed", "UserError"]
    saved = f"step 3 is saved in {folder / 'data-error'}, --resume continues from it"
    assert found[1]["text"] == f"chats.jsonl: the file changed; {saved}"
    assert_near(trained(folder, "data-error-resumed"), weights(go(recipe_of("sft", tmp_path / "whole")).model))


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        (
            "diverged",
            "Diverged",
            "step 6: stopped before the update, the weights are those of step 4; in records 20 to",
        ),
        ("uneven", "UserError", "batch.size: expected a multiple of the 2 processes, got 3"),
        ("full-0", "OSError", "No space left on device"),
        ("full-1", "OSError", "No space left on device"),
    ],
)
def test_an_error_ends_both_and_one_says_why(name, kind, text, folder):
    found = noted(folder, name)
    assert sorted(each["kind"] for each in found) == sorted(["OtherRankFailed", kind])
    said = next(each["text"] for each in found if each["kind"] == kind)
    assert text in said
    if name == "diverged":  # the pair is one of process 1's
        assert "the loss is nan for pair " in said
    if name.startswith("full"):
        assert found[int(name[-1])]["kind"] == kind, "who had no room says so"
        assert checkpointing.newest_checkpoint(folder / name / "checkpoints").step < 4
        assert not (folder / name / "model").exists()


@pytest.mark.parametrize(("parallel", "shards"), [("shard", 4), ("replicate", 1)])
def test_what_each_of_four_processes_takes(parallel, shards, tmp_path):
    """A quarter of the streams, and of what hangs on weights where they are in shards; the host holds all four's."""
    recipe = recipe_of("sft", tmp_path, parallel=parallel, data__memory_place="host")
    material = tiny(), small_tokenizer(), records("sft"), {}
    one, four = (
        build.make_stage(recipe, *material, world=w) for w in (World(), World(rank=3, world_size=4, local_world_size=4))
    )
    cpu = torch.device("cpu")
    taken = [memory.on_device(stage, 24, cpu, "device") for stage in (one, four)]
    for name in ("weights", "gradients", "momentum and second moment", "priors"):
        assert taken[0][name] == shards * taken[1][name]
    assert taken[0]["Transformer-XL memory"] == 4 * taken[1]["Transformer-XL memory"]
    assert 0 < taken[1].get("gathered weights", 0) < taken[0]["weights"] * 2
    assert 4 * sum(memory.on_host(four, cpu, "host").values()) == sum(memory.on_host(one, cpu, "host").values())
    every, own = (stage.next_batch().micro_batches[0] for stage in (one, four))
    assert torch.equal(own.tokens, every.tokens[3:])
    assert torch.equal(own.targets, every.targets[3:])


class Alike(World):
    """Whose processes all say the same."""

    def all_gather_object(self, value):
        return [value] * self.world_size

    def first_failed(self, failed):
        return 0 if failed else None


def test_from_a_checkpoint_on_a_process_sees_what_all_have_cached(tmp_path):
    recipe = recipe_of("align", tmp_path, objective__reference="cache")
    stages = []
    for rank in range(SIZE):
        world = Alike(rank=rank, world_size=SIZE)
        stages.append(build.make_stage(recipe, tiny(), small_tokenizer(), records("align"), {}, world=world))
        stages[rank].reference = stages[rank].model
    parts = [stage.next_batch().micro_batches[0] for stage in stages]
    rows = [stage.frozen(part) for stage, part in zip(stages, parts, strict=True)]
    for stage in (*stages, *stages):  # together, in truth
        stage.state()
    for stage in stages:
        stage.frozen.cache.any_rank = bool
        assert all(torch.equal(stage.frozen(part), row) for part, row in zip(parts, rows, strict=True))
        assert stage.frozen.cache.computed == len(parts[0].pairs)


@pytest.mark.gpu
@pytest.mark.slow
def test_two_gpus(tmp_path):
    """NCCL, and memories, states and masks on the device: as one GPU alone."""
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs, and PyTorch sees {torch.cuda.device_count()}")
    run_both("parallel_runs.py", tmp_path, "cuda", timeout=300)
    for name in CASES:
        one = weights(one_process(name, tmp_path / "one" / name, device="cuda").model)
        begun = weights(tiny(**CASES[name][2]))
        moved = max(float((one[key].cpu() - p).abs().max()) for key, p in begun.items())
        found = {key: t.cuda() for key, t in trained(tmp_path, name).items()}
        assert_near(found, one, 0.1 * moved if name.endswith("bf16") else 10 * RATE)


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command line in two processes: one model, one voice; and none of their threads is left when Python ends."""
    material(tmp_path)
    (tmp_path / "command.py").write_text(THREADS_AT_END)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    more = ["output.log_every=3", "optimiser.warmup=1"]
    _, _module, _name, *words = command(tmp_path, "run", 6)
    done = subprocess.run(
        [*torchrun, str(tmp_path / "command.py"), *words, *more], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pt_gloo" not in done.stdout
    assert done.stdout.count("python") >= SIZE * sys.platform.startswith("linux")
    lines = [line for line in done.stderr.splitlines() if line.startswith("sft")]
    assert [line.split(":")[0] for line in lines] == ["sft"] * 5 + ["sft 3/6", "sft 6/6", "sft"]  # 4 of the data
    assert lines[0].endswith("run holds no checkpoint to resume, starting from the beginning")
    dph.Model.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_all_that_meets_several_processes(tmp_path, inductor):
    """Compiled and checkpointed blocks, loader workers, memory on the host, a best checkpoint: as by one process."""
    material(tmp_path)
    held_out = (tmp_path / "messages.jsonl").read_text().splitlines(keepends=True)[:9]
    (tmp_path / "held-out.jsonl").write_text("".join(held_out))
    more = [
        "compile=true", "checkpointing=block", "data.workers=2", "data.memory=64", "data.memory_place=host",
        "batch.micro=6", f"evaluation.sources=[{tmp_path / 'held-out.jsonl'}]", "evaluation.every=2",
        "output.best=loss", "optimiser.warmup=1",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    for name, start in (("one", [sys.executable]), ("two", torchrun)):
        asked = [*start, *command(tmp_path, name, 6)[1:], *more]
        done = subprocess.run(asked, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert_near(two, one, 20 * RATE)
    best = [json.loads((tmp_path / name / "checkpoints" / "best.json").read_text()) for name in ("one", "two")]
    assert best[1] == best[0] | {"value": pytest.approx(best[0]["value"], rel=1e-5)}


def test_a_process_whose_neighbour_failed_says_nothing(monkeypatch, capsys):
    def fail(*_, **__):
        raise OtherRankFailed("another process failed, and says why")

    monkeypatch.setattr(entry, "train", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["train", "mini-sft"]) == 1
    assert capsys.readouterr() == ("", "")


def test_devices_of_several_processes(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **dict.fromkeys(distributed.TORCHRUN_VARIABLES, "0")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(UserError, match="device: expected auto, cpu or cuda when several processes train, got 'cuda:1'"),
        distributed.init_distributed("shard", "cuda:1"),
    ):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(UserError, match=r"LOCAL_RANK: expected .* got 'cuda:2'"),
        distributed.init_distributed("shard", "auto"),
    ):
        pass
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    message = "WORLD_SIZE: expected LOCAL_WORLD_SIZE together with it, as torchrun sets them, got 2 alone"
    with pytest.raises(UserError, match=message), distributed.init_distributed("shard", "cpu"):
        pass
