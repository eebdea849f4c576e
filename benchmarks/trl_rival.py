"""TRL's DPOTrainer, the most common way to align a model, on a Llama of our model's size, or on the job's own Llama.

It trains other weights by the DPO loss alone (no reward, no label smoothing, AdamW), pads each batch to its longest
sequence and computes every prompt twice. Since its architecture differs, its loss and gradients are compared with DPO's
equation on the logits of its own model, answer by answer, and not with ours.
"""

import copy
import importlib.util
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import lengths
from dph.chat import Encoded
from dph.losses import cdpo_loss, sequence_logprobs

MISSING = None if importlib.util.find_spec("trl") else "TRL is not installed: pip install trl"
BETA = 0.6


def llama(job: Any) -> Any:
    """Return the job's model in transformers' implementation.

    Without one, a Llama of our backbone's sizes, with a tied embedding as wide as its hidden states.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if job.model is not None:
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(job.config(), name) for name in same}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=4096))


def example(pair: tuple[Encoded, Encoded]) -> dict[str, list[int]]:
    """Return a pair in TRL's tokenised form: the prompt, and each answer with its end."""
    fields: dict[str, list[int]] = {}
    for name, side in zip(("chosen_ids", "rejected_ids"), pair, strict=True):
        start = side.loss_mask.index(True) + 1  # a mask is on at the position before the token that it covers
        end = len(side.loss_mask) - side.loss_mask[::-1].index(True)
        fields |= {"prompt_ids": side.tokens[:start], name: side.tokens[start : end + 1]}
    return fields


class TrlTrainer:
    """Steps of ``trl.DPOTrainer`` over the pairs of ``job``, ``micro_pairs`` at a time; see ``train_step.Stepping``."""

    def __init__(self, job: Any) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Tokenised(DPOTrainer):
            """A trainer whose records are tokens already."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        self.watch, self.examples = None, [example(pair) for pair in job.records()]
        self._folder, self.micro = tempfile.TemporaryDirectory(), job.recipe().batch.micro
        torch.manual_seed(0)
        model = llama(job).to(job.device)
        self.trainer = Tokenised(
            model,
            copy.deepcopy(model),
            DPOConfig(
                self._folder.name, beta=BETA, max_length=None, bf16=job.lowered, report_to="none",
                use_cpu=job.device == "cpu", per_device_train_batch_size=self.micro, max_steps=1, disable_tqdm=True,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(self.examples),
            processing_class=lengths.small_tokenizer(),
        )  # fmt: skip
        self.model, self.reference = self.trainer.model.train(), self.trainer.ref_model
        self.optimiser = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = len(self._parts())

    def _parts(self) -> list[list[dict[str, list[int]]]]:
        return [self.examples[i : i + self.micro] for i in range(0, len(self.examples), self.micro)]

    def step(self) -> Tensor:
        """Take one optimizer step and return its loss."""
        losses = []
        for part in self._parts():
            losses.append(self.trainer.training_step(self.model, self.trainer.data_collator(part)))
        if self.watch is not None:
            self.watch(self.gradients())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return sum(losses)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the Llama's names."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by the Llama's names."""
        return dict(self.model.named_parameters())

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and gradients of the next step by DPO's equation, one answer at a time."""
        loss = equation(self.model, self.reference, self.examples)
        loss.backward()
        gradients = self.gradients()
        self.model.zero_grad()
        return loss.detach(), gradients


def equation(model: Any, reference: Any, examples: list[dict[str, list[int]]]) -> Tensor:
    """Return DPO's loss of a causal model on the pairs of ``example``, one answer at a time."""
    logprobs = {}
    for role, each in (("policy", model), ("reference", reference)):
        for side in ("chosen", "rejected"):
            values = torch.stack([_logprob(each, pair, side) for pair in examples])
            logprobs[f"{role}_{side}"] = values.detach() if role == "reference" else values
    return cdpo_loss(**logprobs, beta=BETA, epsilon=0.0)


def _logprob(model: Any, pair: dict[str, list[int]], side: str) -> Tensor:
    tokens = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]], device=model.device)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    targets[:, : len(pair["prompt_ids"]) - 1] = -100
    return sequence_logprobs(model(tokens).logits, targets)[0]


def check(job: Any, steps: int = 3) -> None:
    """Compare TRL's loss and gradients in fp32 with DPO's equation, over ``steps`` optimizer steps."""
    one = TrlTrainer(job)
    for _ in range(steps):
        loss, gradients = one.expected()
        seen: dict[str, Tensor] = {}
        one.watch = seen.update
        got = float(one.step())
        assert abs(got - float(loss)) <= 1e-4 * abs(float(loss)), f"loss: expected {float(loss)}, got {got}"
        for name, want in gradients.items():
            off = float((seen[name] - want).norm() / want.norm().clamp(min=1e-12))
            assert off <= 1e-3, f"gradient of {name}: off by {off:.1e}"
