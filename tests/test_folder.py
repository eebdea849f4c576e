"""JSON of a model's folder: every fault is one line with the file, and keys that name code are refused."""

import json
import os

import pytest

from dph import _folder
from dph.errors import UserError

# Settings of a cloned Llama folder in its usual form.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "_name_or_path": "meta-llama/Llama-3.2-1B", "model_type": "llama",
    "torch_dtype": "bfloat16", "rope_scaling": {"factor": 32.0, "rope_type": "llama3"}, "use_cache": True,
    "quantization_config": None, "_attn_implementation": "sdpa", "attn_implementation": {"": "flash_attention_2"},
    "auto_map": None, "custom_pipelines": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": [1, ]}', r":1: expected JSON, got: .* at column 1[01]"),
        (b'{\n"a', r":2: expected JSON, got: Unterminated string"),
        (b"", r":1: expected JSON, got: Expecting value at column 1"),
        (b"[1]", r": expected a JSON object, got \[1\]"),
        (b"null", r": expected a JSON object, got None"),
        (b'{"a": "\xff"}', r": expected UTF-8, got another byte at position 7"),
        (b'{"a": ' + b"[" * 100_000, r": expected JSON of a usual depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", r": expected numbers of a usual size"),
        (b" " * 5000, r": expected a JSON file of at most 0 MiB"),
    ],
    ids=["comma", "string", "empty", "list", "null", "bytes", "deep", "digits", "large"],
)
def test_broken_json_names_the_file(content, text, tmp_path, monkeypatch):
    if content.isspace():
        monkeypatch.setattr(_folder, "MAX_JSON", 1000)
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}{text}"):
        _folder.read_json(file)


def test_other_things_than_files(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: reading would block for ever
    expected = {"folder": "a folder", "pipe": "a pipe or device", "none": "nothing there"}
    for name, text in {**expected, "link": "a link to 'gone', which does not exist"}.items():
        with pytest.raises(UserError, match=f"{name}: expected a JSON file, got {text}"):
            _folder.read_json(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(UserError, match=r"config.json: expected a readable file, got: Permission denied"):
        _folder.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"auto_map": ["evil.Tokenizer", None]}, "auto_map"),
        ({"text_config": {"vision": [{"auto_map": {"AutoConfig": "evil.C"}}]}}, "text_config.vision.auto_map"),
        ({"custom_pipelines": {"x": {"impl": "evil.P"}}}, "custom_pipelines"),
        ({"custom_generate": "evil/repository"}, "custom_generate"),
        ({"use_kernels": True}, "use_kernels"),
        ({"_attn_implementation": "kernels-community/flash-attn"}, "_attn_implementation"),
        ({"attn_implementation": {"": "sdpa", "text": "evil/kernel@main:f"}}, "attn_implementation"),
        ({"_experts_implementation": "evil/kernel"}, "_experts_implementation"),
    ],
)
def test_keys_that_name_code_are_refused_by_name(fields, name):
    with pytest.raises(UserError, match=rf"^x.json: {name}: expected no code or kernel to load .*, got ."):
        _folder.refuse_code(fields, "x.json")
    _folder.refuse_code({**LLAMA, "deep": json.loads('{"a":' * 500 + "1" + "}" * 500)}, "x.json")


def test_lists_of_implementations_are_looked_through():
    with pytest.raises(UserError, match=r"^config.json: attn_implementation: expected no code or kernel"):
        _folder.refuse_code({"attn_implementation": ["sdpa", {"vision": "owner/kernel"}]}, "config.json")
    _folder.refuse_code({"attn_implementation": ["sdpa", {"vision": "eager"}]}, "config.json")
