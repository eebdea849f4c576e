"""accelerate's offload, torchao's quantised layers, transformers' Trainer, pipelines and remote code, lm-eval."""

import subprocess
import sys

import pytest
import torch
from helpers.command_line import save_models
from helpers.harness import samples
from helpers.texts import conversation
from helpers.tiny import END, tiny_config, tiny_model, tokens
from helpers.two import environment
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

import dph
from dph.model.auto_classes import RewardModel

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.ecosystem
OFFLINE = environment(HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models")) / "judge"


def ended(rows=2, length=9):
    ids = tokens(rows, length)
    ids[:, -1] = END
    return ids


@torch.no_grad()
def results(model):
    output = model(ended(), labels=ended())
    return output.logits, output.loss, model.rewards(ended())["default"]


# accelerate and torchao


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_changes_nothing(place, tmp_path):
    model = tiny_model(reward_pooler="swiglu_bert")
    expected = results(model)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.lm_head.weight.is_meta
    logits, loss, rewards = results(model)
    assert torch.equal(logits, expected[0])
    assert torch.equal(loss, expected[1])
    torch.testing.assert_close(rewards, expected[2], rtol=1e-6, atol=1e-6)  # by modules, not by the kernel


def test_a_device_map_with_the_disk(folder, tmp_path):
    places = {"backbone": "disk", "output_proj": "cpu", "lm_head": "disk", "heads": "disk"}
    split = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path))
    ids = tokens(2, 9)
    assert torch.equal(split(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)


def test_quantised_layers_are_called():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(reward_pooler="swiglu_bert")
    expected = results(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for got, wanted in zip(results(model), expected, strict=True):
        assert not torch.equal(got, wanted)
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.2)


# transformers' Trainer


def trainer(model, folder, **options):
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **options)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    return Trainer(model, arguments, train_dataset=rows)


def test_smoothed_labels_are_shifted(tmp_path):
    model, ids = tiny_model(), tokens(4, 9)
    loss = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, {"input_ids": ids, "labels": ids})
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    likelihood = -logprobs.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(loss, 0.9 * likelihood - 0.1 * logprobs.mean())


def test_noise_in_embeddings(tmp_path):
    model = tiny_model()
    assert trainer(model, tmp_path, neftune_noise_alpha=5.0, max_steps=2).train().training_loss > 0
    model.get_input_embeddings().register_forward_hook(lambda *_: torch.ones(2, 9, model.config.embedding_size))
    ones = torch.ones(2, 9, model.config.embedding_size)
    torch.testing.assert_close(model(tokens(2, 9)).logits, model(inputs_embeds=ones).logits)
    judge = RewardModel(tiny_config()).eval()
    expected = judge(inputs_embeds=ones).logits
    judge.get_input_embeddings().register_forward_hook(lambda *_: ones)
    torch.testing.assert_close(judge(ended()).logits, expected)
    torch.testing.assert_close(judge.rewards(ended())["default"], expected[:, 0])


def test_flattened_documents_by_positions_or_by_bounds():
    model = tiny_model()
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (4, 6)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": row} for row in rows])
    expected = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
    torch.testing.assert_close(model(**batch).logits, expected)
    del batch["position_ids"]
    torch.testing.assert_close(model(**batch).logits, expected)


TORCHRUN = """
import sys, torch
from helpers.tiny import tiny_model, tokens
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments(
    output_dir=sys.argv[1], report_to=[], use_cpu=True, gradient_checkpointing=True, max_steps=2, ddp_backend="gloo",
    per_device_train_batch_size=2, save_strategy="no", weight_decay=0.1,
)
model = tiny_model()
heads = [p.detach().clone() for p in model.heads.parameters()]
rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
Trainer(model, arguments, train_dataset=rows).train()
assert all(map(torch.equal, model.heads.parameters(), heads))
print("trained")
"""


def test_heads_take_no_part_in_data_parallel_training(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(HF_HUB_OFFLINE="1"),
    )
    assert done.stdout.count("trained") == 2, done.stderr


# Pipelines, remote code, lm-eval


def test_pipelines(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = conversation("a film?", "is gripping")
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    judge = AutoModelForSequenceClassification.from_pretrained(folder)
    classify = pipeline("text-classification", model=judge, tokenizer=tokenizer)
    scores = {entry["label"]: entry["score"] for entry in classify(text, top_k=None, function_to_apply="none")}
    assert scores.keys() == {"default", "short"}
    for head, score in scores.items():
        assert score == pytest.approx(judge.score(tokenizer, [turns], head=head).item(), abs=1e-5)
    squashed = {entry["label"]: entry["score"] for entry in classify(text, top_k=None)}
    assert squashed["default"] == pytest.approx(torch.tensor(scores["default"]).sigmoid().item(), abs=1e-5)
    generate = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    assert generate("a film", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("a film")
    extract = pipeline("feature-extraction", model=AutoModel.from_pretrained(folder), tokenizer=tokenizer)
    assert len(extract("a film")[0][0]) == judge.config.embedding_size


def test_programs_that_were_not_told_of_dph_open_a_saved_folder(folder):
    lines = [
        "from transformers import AutoModel, AutoModelForCausalLM",
        f"for kind in (AutoModel, AutoModelForCausalLM): print(kind.from_pretrained({str(folder)!r}, "
        "trust_remote_code=True).__class__.__name__)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(HF_HUB_OFFLINE="1"),
    )
    assert done.stdout.split() == ["BaseModel", "Model"], done.stderr


def test_lm_eval_from_its_command_line(folder, tmp_path):
    pytest.importorskip("lm_eval")
    choices = ["is good", "dull"]
    arguments = ["--model", "hf", "--device", "cpu", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    (line,) = samples(tmp_path, "lm_eval", arguments, {"q": "a film", "c": choices, "a": 0})
    got = [float(response[0][0]) for response in line["resps"]]
    model, tokenizer = dph.Model.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for value, choice in zip(got, choices, strict=True):
        prompt = tokenizer("a film", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"a film {choice}", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=labels).loss
        assert value == pytest.approx(-loss.item() * (len(ids) - len(prompt)), abs=1e-3)
