"""What a dry run says, against what training takes."""

import json

import pytest
import torch
from helpers.stages import records, settings, tiny
from helpers.texts import conversation, small_tokenizer

import dph
from dph import devices
from dph.cli import main
from dph.data.formats import Encoder, Preference
from dph.data.packing import pack
from dph.errors import UserError
from dph.train import compile, distributed, recipe
from dph.train.budget import estimate, memory
from dph.train.build import make_stage
from dph_kernels import dispatch


@pytest.fixture
def start(tmp_path):
    """A model's directory and files of records."""
    tiny().save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    pair = {"prompt": "hello", "chosen": "world", "rejected": "late"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 9)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The quick brown fox. " * 9}) + "\n")
    return tmp_path


def make(start, stage, source, **changes):
    values = settings(stage, start / "run", **changes).as_dict()
    values["model"] = {"path": str(start / "model")}
    values["data"]["sources"] = [{"source": str(start / source)}]
    return recipe.from_dict(values)


def test_numbers_of_a_stage(start):
    found = estimate.estimate(make(start, "align", "pairs.jsonl", batch__micro=2))
    model = tiny()
    pair = Encoder(small_tokenizer())(Preference(conversation("hello", "world"), conversation("hello", "late")))
    assert found.parameters == found.trained == model.num_parameters()
    assert found.tokens == 4 * len(pack([pair]).tokens)
    assert (found.steps, found.device) == (8, "CPU")
    assert found.memory["weights"] == 4 * model.num_parameters()
    assert found.memory["reference model"] == 4 * (
        model.num_parameters() - sum(p.numel() for p in model.heads.parameters())
    )
    assert found.memory["momentum and second moment"] == 8 * model.num_parameters()
    assert "fp32 masters" not in found.memory
    assert found.seconds == pytest.approx(8 * found.flops / (estimate.ASSUMED * found.rate))
    low = estimate.estimate(make(start, "align", "pairs.jsonl", precision="bf16"))
    assert low.memory["weights"] == 2 * model.num_parameters()
    assert low.memory["fp32 masters"] == 4 * model.num_parameters()
    assert low.memory["activations"] == pytest.approx(
        found.memory["activations"], rel=0.2
    )  # twice the rows, half a size


def test_what_each_of_two_processes_takes(start, monkeypatch, capsys):
    """Half of what lies in shards, fp32 also where they are gathered in bf16; the first process says so."""
    one = estimate.estimate(make(start, "align", "pairs.jsonl", precision="bf16"))
    for name, value in {**dict.fromkeys(distributed.TORCHRUN_VARIABLES, "2"), "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    two = estimate.estimate(make(start, "align", "pairs.jsonl", precision="bf16"))
    assert (one.processes, two.processes) == (1, 2)
    assert (two.tokens, two.flops, two.host) == (one.tokens, one.flops, {})
    assert two.memory["weights"] == one.memory["weights"] == 2 * tiny().num_parameters()
    assert two.memory["reference model"] == one.memory["reference model"] / 2
    assert "fp32 masters" not in two.memory
    assert two.seconds == pytest.approx(8 * two.flops / (estimate.ASSUMED * two.rate * 2))
    asked = ["train", "mini-align", "--dry-run", f"model.path={start / 'model'}"]
    asked += [f"data.sources=[{start / 'pairs.jsonl'}]", "evaluation.sources=[]", "evaluation.every=0", "device=cpu"]
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert main.main(asked) == 0
        assert capsys.readouterr().out.count("processes (figures are per process)  ") == lines


@pytest.mark.parametrize(("stage", "source"), [("align", "pairs.jsonl"), ("head", "pairs.jsonl"),
                                               ("pretrain", "texts.jsonl")])  # fmt: skip
def test_rows_of_a_part(start, stage, source):
    """Of the hidden states that the backbone gives at a time: those of one bin, where stage head has all in a part."""
    made = make_stage(make(start, stage, source, batch__micro=2), tiny(), small_tokenizer(), records(stage), [])
    made.reference, seen = tiny(), []
    made.model.backbone.register_forward_hook(lambda module, inputs, out: seen.append(out[..., 0].numel()))
    parts = made.next_batch().micro_batches
    for part in parts:
        made.loss(made.prepare(part, 0))
    assert len(parts) == (1 if stage == "head" else 2)
    assert max(part.rows for part in parts) == max(seen)


def test_frozen_parts_take_no_state(start):
    found = estimate.estimate(make(start, "head", "pairs.jsonl"))
    heads = sum(p.numel() for name, p in tiny().named_parameters() if name.startswith("heads."))
    assert found.trained == heads
    assert found.memory["gradients"] == 4 * heads
    assert "activations" not in found.memory


def test_gradients_take_the_place_of_the_activations_of_an_only_part(start):
    stage, cpu = stage_of(start), torch.device("cpu")
    several, alone = (memory.on_device(stage, 4 * 24, cpu, "device", alone=alone) for alone in (False, True))
    gradients, kept = several["gradients"], several["activations"]
    assert sum(several.values()) - sum(alone.values()) == min(gradients, kept) > 0
    few = memory.on_device(stage, 1, cpu, "device", alone=True)
    assert few["gradients beyond activations"] == gradients - few["activations"] > 0
    parts = {
        micro: estimate.estimate(make(start, "pretrain", "texts.jsonl", batch__micro=micro)).memory for micro in (2, 4)
    }
    assert "gradients" in parts[2]
    assert "gradients" not in parts[4]


def test_memory_of_streams(start):
    sizes = {kind: estimate.estimate(make(start, "pretrain", "texts.jsonl", data__memory_kind=kind)).memory
             for kind in ("kv", "hidden")}  # fmt: skip
    assert sizes["kv"]["Transformer-XL memory"] == 4 * 20 * 2 * 2 * 16 * 4  # streams, tokens, layers, k and v, C, bytes
    assert sizes["hidden"]["Transformer-XL memory"] == sizes["kv"]["Transformer-XL memory"] / 2


def test_memory_of_streams_on_the_host(start):
    """Rings of twice the size on the host; on the device one part's windows, of two layers at a time."""
    found = {kind: estimate.estimate(make(start, "pretrain", "texts.jsonl", data__memory_kind=kind, batch__micro=2,
                                          data__memory_place="host", checkpointing="block"))
             for kind in ("kv", "hidden")}  # fmt: skip
    ring = 2 * 4 * 20 * 16 * 4  # twice, streams, tokens, C, bytes
    assert found["kv"].host == {"Transformer-XL memory": 2 * 2 * ring}  # layers, k and v
    assert found["hidden"].host == {"Transformer-XL memory": 2 * ring}
    assert "Transformer-XL memory" not in found["kv"].memory
    assert found["kv"].memory["windows of the memory on the host"] == 2 * 2 * 2 * 20 * 16 * 4
    assert "host footprint: Transformer-XL memory  " in found["kv"].table()


def stage_of(start, **changes):
    """A stage of four streams that has held-out ones, too."""
    values = make(start, "pretrain", "texts.jsonl", precision="auto", **changes)
    return make_stage(values, tiny(), small_tokenizer(), records("pretrain"), records("pretrain", 3))


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("kind", ["kv", "hidden"])
def test_memory_lies_on_a_gpu_where_all_of_the_run_fits(start, kind, checkpointing, monkeypatch):
    stage, gpu = stage_of(start, data__memory_kind=kind, checkpointing=checkpointing), torch.device("cuda")
    parts = memory.on_device(stage, 4 * 24, gpu, "device")
    rings = (2 if kind == "kv" else 1) * 2 * 20 * 16 * 2  # layers, tokens, C, bytes in bf16
    assert parts["Transformer-XL memory"] == 4 * rings
    assert parts["Transformer-XL memory of held-out streams"] == 3 * rings
    needed = sum(parts.values())
    for room, place in ((needed / 0.9 + 1, "device"), (needed / 0.9 - 1, "host")):
        monkeypatch.setattr(devices, "device_memory", lambda device, room=room: room)
        assert memory.choose_place(stage, gpu) == place
        assert f"the memory of 4 streams is on the {place}; all on the GPU" in memory.explain_place(stage, gpu, place)


def test_pinned_memory_comes_in_powers_of_two(start):
    stage = stage_of(start, batch__micro=2)
    on_host = memory.on_host(stage, torch.device("cuda"), "host")
    ring = 2 * 2 * 20 * 16 * 2  # twice, streams of a part, tokens, C, bytes in bf16
    assert ring == 2560
    assert on_host == {"Transformer-XL memory": 2 * 2 * 2 * 4096,  # parts, layers, k and v
                       "Transformer-XL memory of held-out streams": 2 * 2 * 2 * 4096}  # fmt: skip


def test_a_host_without_room_is_named(start, monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 10_000)
    message = r"data.memory_place: expected 0.08 MB on the host for the memory of 4 streams, got 0.01 MB"
    with pytest.raises(UserError, match=message):
        stage_of(start, data__memory_place="host")
    assert stage_of(start).memory_place == "device"


def test_an_update_that_no_host_holds_names_both_sizes(start):
    sizes = r"got 65,536 times 16,777,216 tokens, which take [\d,]+\.\d\d GB"
    message = rf"^batch\.size, data\.context: .* GB on the host, {sizes}"
    with pytest.raises(UserError, match=message):
        stage_of(start, data__context=2**24, batch__size=2**16)


def test_the_host_says_how_much_memory_it_has():
    assert 1e8 < devices.host_memory() < 1e14


@pytest.mark.parametrize(("checkpointing", "compiled"), [("none", False), ("block", False), ("none", True)])
def test_activations_are_those_that_autograd_keeps(checkpointing, compiled, request, monkeypatch):
    """Within a tenth, of a model with the paper's proportions."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)  # as of real sizes
    torch.manual_seed(0)
    config = dph.ModelConfig(
        vocab_size=512, embedding_size=96, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=3, reward_heads=(),
    )  # fmt: skip
    model, rows = dph.Model(config), 200
    model.backbone.gradient_checkpointing = checkpointing == "block"
    if compiled:
        request.getfixturevalue("inductor")
        compile.switch_on(model.backbone)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address serves twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.stream_logprobs(torch.randint(512, (1, rows)), torch.randint(512, (1, rows))).sum()
    measured = sum(size for size, _ in kept.values())
    values = settings("sft", "unused", checkpointing=checkpointing, compile=compiled)
    reckoned = memory.activations(values, model.config, rows, 4)
    if checkpointing == "block":  # while one block is computed again, its own activations are there
        reckoned -= rows * (4 * (10 * 192 + 3 * 512) + 4 * 3)
    assert reckoned == pytest.approx(measured, rel=0.1)


def test_the_command_writes_nothing(start, capsys, monkeypatch):
    monkeypatch.chdir(start)
    before = sorted(start.rglob("*"))
    arguments = [f"model.path={start / 'model'}", f"data.sources=[{start / 'pairs.jsonl'}]", "batch.size=4"]
    assert main.main(["train", "mini-align", *arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("parameters", "total footprint", "tokens in a step", "minutes"):
        assert word in said
    assert sorted(start.rglob("*")) == before


def test_records_that_the_first_update_leaves_out_are_told(start):
    pairs = [{"prompt": "hello", "chosen": "world", "rejected": "late" + " late" * 300 * (i % 2)} for i in range(8)]
    (start / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    last = estimate.estimate(make(start, "align", "pairs.jsonl", batch__size=8)).table().splitlines()[-1]
    assert last.startswith("first step: ")
    assert "records were left out: " in last
    assert last.endswith(" longer than 200 tokens (data.context)")
