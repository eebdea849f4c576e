"""Heads on models of transformers: rewards are those of a plain pass, whatever the packing, batch and padding."""

import concurrent.futures
import dataclasses
import itertools
import json
import shutil

import pytest
import torch
from helpers.stages import Killed, Trap, die, figures, records, settings, taken
from helpers.texts import conversation, message, small_tokenizer, write_lines
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    RobertaConfig,
    T5Config,
)

import dph
from dph import chat
from dph.cli.main import main
from dph.errors import UserError
from dph.infer.best_of_n import sample
from dph.model import attached_backbone
from dph.model.attached import AttachedConfig, AttachedModel
from dph.model.head_file import backbone_digest
from dph.model.loading import load_model
from dph.train.build import make_stage
from dph.train.entry import train

V = len(small_tokenizer()) + 3
END = small_tokenizer().convert_tokens_to_ids("<|im_end|>")
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
COMMON = {"vocab_size": V, "max_position_embeddings": 300, **SIZES, **IDS}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_positions=300, n_embd=16, n_layer=3, n_head=2, **IDS),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=24),
    "opt": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=8),
    "gemma3": Gemma3TextConfig(
        **COMMON, **WINDOW, num_key_value_heads=1, head_dim=8, intermediate_size=24, final_logit_softcapping=3.0
    ),
    "phi": PhiConfig(**COMMON, intermediate_size=24),
    "bloom": BloomConfig(vocab_size=V, hidden_size=16, n_layer=3, n_head=2, **IDS),
    "mamba": MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=3, state_size=4, **IDS),
    "llama": LlamaConfig(**COMMON, intermediate_size=24),
}
ROBERTA = RobertaConfig(**COMMON, intermediate_size=24, is_decoder=True)  # its positions begin at 2


def network(kind, seed=0):
    """A tiny network of a kind or a configuration, with weights that are large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[kind] if isinstance(kind, str) else kind, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.5 * (parameter.ndim == 1))
    return model


def attached(kind, seed=0, **options):
    """The network with heads that count as trained."""
    model = dph.attach(network(kind), **options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.heads.named_parameters():
            if "standardise" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of networks as transformers saves them, each with the tokenizer."""
    root = tmp_path_factory.mktemp("networks")
    for kind in ("gpt2", "opt", "gemma3", "llama"):
        network(kind).save_pretrained(root / kind)
        small_tokenizer().save_pretrained(root / kind)
    return root


def ids(count, seed):
    return torch.randint(5, V - 3, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def finished(tokens):
    mask = [True] * (len(tokens) - 1) + [False]
    return chat.Encoded(tokens, [*tokens[1:], 0], mask, mask, len(tokens) - 1)


def groups():
    """Alternatives of prompts of different lengths, one without another, one that ends where another goes on."""
    first, second = ids(40, 1), ids(7, 2)
    both = [[first + ids(n, n) + [END] for n in (4, 11, 60)], [[*second, END], [*second, END, 9, END]]]
    return [list(map(finished, group)) for group in (*both, [[*ids(30, 3), END]])]


def plain(model, tokens, layer):
    """State of the last token in a layer and log-probability of all others, by the network alone, by hand."""
    net, states = model.backbone.network, []
    watched = model.backbone.blocks[layer] if layer >= 0 else net.get_output_embeddings()
    if layer < 0 and model.backbone.has_projection:
        watched = model.backbone.body.project_out
    hook = watched.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([tokens])).logits[0]
    hook.remove()
    logprobs = logits.float().log_softmax(-1)[:-1].gather(1, torch.tensor(tokens)[1:, None])
    return states[0][0, -1], logprobs.sum()


@pytest.mark.parametrize("kind", CONFIGS)
def test_rewards_and_logprobs_are_those_of_a_plain_pass(kind, monkeypatch):
    for layer in (-1, 1):
        model = attached(kind, layer=layer, standardised=layer > 0)
        if layer > 0:
            model.heads["shared"].standardise.fit(torch.randn(20, 16) * 3 + 1)
        assert model.config.shares_prompts == (kind != "mamba")
        answers = list(itertools.chain.from_iterable(groups()))
        by_hand = [plain(model, answer.tokens, layer) for answer in answers]
        rewards = model.heads["shared"](torch.stack([state for state, _ in by_hand]))["default"].tolist()
        logprobs = [float(logprob) for _, logprob in by_hand]
        for packing, limit in (({}, 8192), ({"max_tokens": 60}, 8192), ({}, 50)):
            monkeypatch.setattr(attached_backbone, "TOKENS", limit)
            judged = model.judge(groups(), **packing)
            got = list(itertools.chain.from_iterable(one.rewards["default"] for one in judged))
            assert got == pytest.approx(rewards, abs=1e-5)
            got = list(itertools.chain.from_iterable(one.logprobs for one in judged))
            assert got == pytest.approx(logprobs, rel=1e-6)
        batch = dph.pack(groups())
        assert model.rewards_of(model.reward_states(batch))["default"].tolist() == pytest.approx(rewards, abs=1e-5)
        width = max(map(len, (answer.tokens for answer in answers)))
        for left in (0, 1):
            rows, masks = [], []
            for answer in answers:
                padding = width - len(answer.tokens)
                rows.append([1] * padding * left + answer.tokens + [1] * padding * (1 - left))
                masks.append([0] * padding * left + [1] * len(answer.tokens) + [0] * padding * (1 - left))
            model.config.im_end_token_id, mask = END, torch.tensor(masks)
            assert model.rewards(torch.tensor(rows), mask)["default"].tolist() == pytest.approx(rewards, abs=1e-5)
            if kind != "mamba":
                logits = model(torch.tensor(rows), attention_mask=mask).logits[0]
                expected = model.backbone.network(input_ids=torch.tensor([answers[0].tokens])).logits[0]
                torch.testing.assert_close(logits[mask[0].bool()], expected, atol=1e-4, rtol=1e-5)


def test_only_what_is_needed_is_computed():
    """Later blocks do not run, a prompt runs once, what is frozen has no gradient and no dropout; in any thread."""
    model, called = attached("gpt2", layer=1).train(), []
    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, args, __, number=number: called.append((number, args[0].shape[:2])))
    first = groups()[0]
    states = model.reward_states(dph.pack([first]))
    assert [number for number, _ in called] == [0] * len(called)
    assert [list(shape) for _, shape in called] == [[1, 40], [1, 61], [2, 12]]
    assert torch.equal(states, model.reward_states(dph.pack([first])))
    assert not states.requires_grad
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.heads.parameters())
    expected = model.judge(groups())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: model.judge(groups()), range(8))) == [expected] * 8
    with pytest.raises(ValueError, match=r"at most 300 .config.max_position_embeddings., got 301"):
        model.judge([[finished([*ids(300, 1), END])]])


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma3", "mamba"])
def test_best_of_n_samples_and_judges(kind):
    model, tokenizer = attached(kind), small_tokenizer()
    messages = [[message("user", "hello")], [message("user", "The quick brown fox, and 12 lazy dogs.")]]
    prompts = [chat.prompt(one, tokenizer) for one in messages]
    cold = sample(model, tokenizer, prompts, 2, max_new_tokens=12, temperature=0)
    for prompt, group in zip(prompts, cold, strict=True):
        expected = list(prompt)
        for _ in range(12):
            expected.append(int(model.backbone.network(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
            if expected[-1] == END:
                break
        assert [*prompt, *group[0].tokens] == expected
        assert group[1] == dataclasses.replace(group[0], index=1)
    candidates = dph.best_of_n(model, tokenizer, messages[0], n=40, max_new_tokens=60, seed=0)
    assert any(candidate.finished for candidate in candidates)
    answers = []
    for candidate in candidates:
        end = candidate.tokens.index(END) + 1 if candidate.finished else None
        answers.append([chat.continuation(prompts[0], candidate.tokens[:end], tokenizer)])
    judged = model.judge(answers)
    for candidate, one in zip(candidates, judged, strict=True):
        assert candidate.logprob == pytest.approx(one.logprobs[0], rel=1e-5)
        assert not candidate.finished or candidate.reward == pytest.approx(one.rewards["default"][0], abs=1e-5)
    sampling = {"max_new_tokens": 60, "seed": 0}
    texts = [candidate.text for candidate in candidates]
    stop = next(text[i : i + 2] for text in texts for i in range(1, len(text)) if text[i : i + 2].isalpha())
    for candidate in dph.best_of_n(model, tokenizer, messages[0], n=40, stop=[stop], **sampling):
        assert stop not in candidate.text
        assert candidate.text in texts or any(text.startswith(candidate.text + stop) for text in texts)
    with pytest.raises(ValueError, match="prune_every: expected a model of this package"):
        dph.best_of_n(model, tokenizer, messages[0], n=2, prune_every=3)
    if model.config.max_position_embeddings:
        with pytest.raises(ValueError, match=r"max_new_tokens: expected at most .* got 300"):
            dph.best_of_n(model, tokenizer, messages[0], n=2, max_new_tokens=300)


@pytest.mark.parametrize("kind", ["opt", "gemma3"])
def test_saved_models_are_opened_bit_for_bit(kind, folders, tmp_path):
    model, tokenizer = dph.attach(folders / kind, heads=("a", "b"), layer=1), small_tokenizer()
    assert model.config.im_end_token_id == END
    with pytest.raises(ValueError, match="head 'a': the checkpoint holds no weights for it"):
        model.score(tokenizer, [conversation("hello", "yes")], head="a")
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn(parameter.shape))
    expected = model.score(tokenizer, [conversation("hello", "yes")], head="a")
    model.save_pretrained(tmp_path / "saved")
    digest = backbone_digest(model.backbone)
    for opened in (
        dph.attach(tmp_path / "saved", heads=("a", "b")),
        load_model(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        assert isinstance(opened, AttachedModel)
        assert opened.head_names == ["a", "b"]
        assert not opened.untrained_heads
        assert backbone_digest(opened.backbone) == digest
        for name, tensor in model.state_dict().items():
            assert torch.equal(opened.state_dict()[name], tensor), name
        assert torch.equal(opened.score(tokenizer, [conversation("hello", "yes")], head="a"), expected)
    more = dph.attach(tmp_path / "saved", heads=("a", "c"), pooler="bert", dtype=torch.bfloat16)
    assert more.head_names == ["a", "b", "c"]
    assert more.untrained_heads == {"c"}
    assert {parameter.dtype for parameter in more.parameters()} == {torch.bfloat16}
    model.save_head(tmp_path / "head", "b")
    bare = load_model(folders / kind)
    assert bare.head_names == []
    assert bare.load_head(tmp_path / "head") == "b"
    torch.testing.assert_close(
        bare.score(tokenizer, [conversation("hello", "yes")], head="b"),
        model.score(tokenizer, [conversation("hello", "yes")], head="b"),
    )
    with pytest.raises(UserError, match="expected a head of this backbone"):
        dph.attach(network(kind, seed=5)).load_head(tmp_path / "head", "other")


def test_native_families_by_name_are_models_of_our_own(folders, tmp_path):
    model = dph.attach(folders / "llama", layer=2, pooler="bert")
    assert type(model) is dph.Model
    assert (model.head_names, model.config.reward_layer, model.untrained_heads) == (["default"], 2, {"default"})
    model.untrained_heads.clear()
    model.save_pretrained(tmp_path)
    again = dph.attach(tmp_path, heads=("default", "new"), layer=1)
    assert again.head_names == ["default", "new"]
    assert [head.layers for head in again.heads.values()] == [(2,), (1,)]
    with pytest.raises(UserError, match="model: expected a directory, a name or a model of transformers, got Model"):
        dph.attach(again)


def by_hand(model, batch, layers=None):
    """The states of ``reward_states`` from plain passes, one for each answer."""
    states = []
    for row, document in zip(batch.reward_rows.tolist(), batch.documents.tolist(), strict=True):
        q0, _, _, _, p0, p1, _ = next(s for s in batch.layout.segments.tolist() if s[0] <= row < s[1])
        tokens = [*batch.tokens[p0:p1].tolist(), *batch.tokens[q0 : row + 1].tolist()]
        assert document >= 0
        states.append(torch.cat([plain(model, tokens, layer)[0] for layer in layers or model.heads.layers]))
    return torch.stack(states)


def head_recipe(folder, directory, **changes):
    return settings("head", directory, model__path=str(folder), optimiser__steps=5, optimiser__warmup=1, **changes)


def run(recipe, data=None, **options):
    return train(recipe, records=data or records("head"), held_out=records("head", 5), quiet=True, **options)


@pytest.mark.parametrize(("kind", "layer"), [("opt", -1), ("gemma3", 1)])
def test_a_head_is_trained_on_the_states_of_plain_passes(kind, layer, folders, tmp_path, monkeypatch):
    options = {"objective__layer": layer, "objective__standardised": layer > 0}
    result = run(head_recipe(folders / kind, tmp_path / "run", **options), tokenizer=small_tokenizer())
    before = network(kind).state_dict()
    for name, tensor in result.model.backbone.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    (cache,) = (tmp_path / "run/cache").iterdir()
    assert cache.name.startswith("states-1-") == (layer == 1)
    opened = load_model(tmp_path / "run")
    assert not opened.untrained_heads
    for (name, tensor), other in zip(result.model.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    monkeypatch.setattr(AttachedModel, "reward_states", by_hand)
    expected = run(head_recipe(folders / kind, tmp_path / "hand", data__cache_states=False, **options))
    for (name, tensor), other in zip(result.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(tensor, other, atol=1e-5, rtol=1e-4, msg=name)


def test_an_interrupted_run_resumes_without_the_folder(folders, tmp_path):
    shutil.copytree(folders / "gpt2", tmp_path / "gpt2")
    recipe = head_recipe(tmp_path / "gpt2", tmp_path / "whole", objective__layer=2)
    whole = run(recipe)
    interrupted = head_recipe(tmp_path / "gpt2", tmp_path / "parts", objective__layer=2)
    with pytest.raises(Killed):
        run(interrupted, Trap(records("head"), taken(recipe, 4) + 1, die))
    shutil.rmtree(tmp_path / "gpt2")
    resumed = run(interrupted, resume=True)
    for (name, tensor), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(tensor, other), name
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_other_stages_are_refused(folders, tmp_path):
    model, tokenizer = load_model(folders / "opt"), small_tokenizer()
    for stage in ("pretrain", "vocab", "sft", "align"):
        with pytest.raises(UserError, match=f"stage: expected head, got {stage}: the opt model is frozen"):
            make_stage(settings(stage, tmp_path), model, tokenizer, records(stage), {})
    with pytest.raises(UserError, match="compile: expected false, got true: the opt model is computed by"):
        make_stage(settings("head", tmp_path, compile=True), model, tokenizer, records("head"), {})


def test_the_commands_take_its_directory(folders, tmp_path, capsys):
    write_lines(tmp_path / "pairs.jsonl", *({"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(9)))
    write_lines(tmp_path / "glue/sst2/validation.jsonl", *({"sentence": f"fox {i}", "label": i % 2} for i in range(4)))
    folder, pairs, run_directory = str(folders / "opt"), str(tmp_path / "pairs.jsonl"), str(tmp_path / "run")
    options = [f"data.sources=[{pairs}]", "evaluation.sources=[]", "optimiser.steps=2", "optimiser.warmup=1"]
    train_command = ["train", "mini-head", f"model.path={folder}", *options, "--output", run_directory]
    main([*train_command, "--dry-run"])
    assert "trained parameters" in capsys.readouterr().out
    main(train_command)
    main(["heads", "--save", str(tmp_path / "head"), "--model", run_directory, "--json"])
    assert json.loads(capsys.readouterr().out)["about"]["steps"] == 2  # the run's record goes with the head
    assert main(["convert", run_directory, str(tmp_path / "classifier"), "--to", "classifier"]) != 0
    assert "expected a model of a family that dph computes" in capsys.readouterr().err
    main(["convert", run_directory, str(tmp_path / "theirs"), "--to", "hf"])
    theirs, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), network("opt").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    capsys.readouterr()
    for model, head in ((run_directory, "default"), (folder, str(tmp_path / "head"))):
        main(["score", model, pairs, "--head", head, "--json"])
        scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert next(score["method"] for score in scores) == "reward"
        main(["generate", model, "--prompt", "hello", "-n", "2", "--max-new-tokens", "4", "--head", head, "--json"])
        assert len(json.loads(capsys.readouterr().out)["candidates"]) == 2
        main(["evaluate", model, "--task", "glue/sst2", "--directory", str(tmp_path), "--head", head])
        assert "reward" in capsys.readouterr().out


def broken(folder, name, change):
    """A copy of a folder with a changed config.json."""
    copy = shutil.copytree(folder, folder.parent / name, dirs_exist_ok=True)
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, **change}))
    return copy


def test_what_cannot_be_attached_is_named(folders, tmp_path):
    small = {"vocab_size": V, **SIZES, "intermediate_size": 24}
    BertModel(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    t5.save_pretrained(tmp_path / "t5")
    shutil.copy(tmp_path / "bert/model.safetensors", tmp_path / "t5")
    code = broken(folders / "gpt2", "code", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    deeper = broken(folders / "gpt2", "deeper", {"n_layer": 4})
    pickled = shutil.copytree(folders / "gpt2", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for model, text in (
        (tmp_path / "bert", "bert: expected a causal language model, got another kind"),
        (BertModel(BertConfig(**small)), "bert: expected a causal language model, got another kind"),
        (tmp_path / "t5", "t5: expected a causal language model, got an encoder with a decoder"),
        (network("gpt2").base_model, "gpt2: expected the class that AutoModelForCausalLM opens, got GPT2Model"),
        (code, r"config.json: auto_map: expected no code or kernel to load"),
        (deeper, r"expected all weights of the model, got 12 missing or of another shape, the first is 'transformer"),
        (pickled, "expected weights in model.safetensors .* got pytorch_model.bin: a pickle"),
        (network(ROBERTA), "roberta: expected logits that follow from .* with positions from 0, got others"),
        (tmp_path / "nothing", "expected the directory of a model, got nothing there"),
        (7, "model: expected a directory, a name or a model of transformers, got int"),
    ):
        with pytest.raises(UserError, match=text) as error:
            dph.attach(model)
        assert "\n" not in str(error.value)
    for name, value, text in (
        ("layer", 3, "reward_layer: expected at most 2, got 3"),
        ("pooler", "x", "reward_pooler:"),
        ("dtype", torch.bfloat16, "attach: expected no dtype with a network in memory"),
    ):
        with pytest.raises(UserError, match=text):
            dph.attach(network("gpt2"), **{name: value})
    for folder in (folders / "gpt2", folders / "llama"):
        with pytest.raises(UserError, match="heads: expected a sequence of names, got 'ab'"):
            dph.attach(folder, heads="ab")
        with pytest.raises(UserError, match=r"attach: expected no pooller, standardized$"):
            dph.attach(folder, standardized=True, pooller=3)
    for name, value in (("initializer_range", "x"), ("shares_prompts", "no"), ("block_weights", None)):
        with pytest.raises(UserError, match=f"{name}: expected"):
            AttachedConfig(**{name: value})
    bidirectional = network("gemma3")
    bidirectional.config.use_bidirectional_attention = bidirectional.model.config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="expected a causal language model, got one whose tokens attend to later ones"):
        dph.attach(bidirectional)
    with pytest.raises(UserError, match=r"got gpt2 .dph.attach adds heads to causal language models of transformers."):
        dph.Model.from_pretrained(folders / "gpt2")
