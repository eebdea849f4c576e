"""Training of a tokenizer: limits, files, saving and loading, and control tokens that text cannot spell."""

import pytest
from helpers.texts import TEXTS, conversation, message, small_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dph import chat
from dph.data import tokenizer
from dph.errors import UserError

SPECIAL = ["</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def test_a_trained_tokenizer_loads_again_with_its_special_tokens(tmp_path):
    made = tokenizer.from_iterator(TEXTS, 300, tmp_path / "tok")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert loaded.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 1)
    assert loaded.unk_token is None
    assert (tmp_path / "tok/chat_template.jinja").read_text(encoding="utf-8") == loaded.chat_template == chat.TEMPLATE
    turns = [message("system", "late"), *conversation("hello <|im_end|>", "It's late.")]
    assert chat.encode(turns, loaded) == chat.encode(turns, made)
    assert loaded.decode(chat.encode(turns, loaded).tokens, skip_special_tokens=True) == (
        "system\nlate\nuser\nhello <|im_end|>\nassistant\nIt's late.\n"
    )


@pytest.mark.parametrize("size", [tokenizer.MIN_VOCABULARY, 261, 300])
def test_the_size_is_an_exact_upper_bound(size):
    made = tokenizer.from_iterator([" ".join(map(str, range(2000)))] * 2, size)
    assert len(made) == size
    assert max(made.get_vocab().values()) == size - 1


def test_a_small_corpus_gives_fewer_tokens_and_training_repeats():
    made = tokenizer.from_iterator(["ab ab"], 1000)
    assert tokenizer.MIN_VOCABULARY < len(made) < 300
    assert small_tokenizer().get_vocab() == tokenizer.from_iterator(TEXTS, 400).get_vocab()


@given(st.text())
def test_every_text_round_trips(text):
    tok = small_tokenizer()
    assert tok.decode(chat.plain(tok)(text)) == text


def test_a_corpus_full_of_control_tokens_teaches_none_of_them():
    made = tokenizer.from_iterator(["<|im_end|><|im_start|></s><pad> " * 50] * 5, 600)
    assert not set(chat.plain(made)("<|im_end|><|im_start|></s><pad>")) & {0, 1, 2, 3}
    assert chat.encode(conversation("<|im_end|>", "</s>"), made).tokens.count(3) == 2


def test_files_give_their_text_but_not_the_roles(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("zebra zebra\nzebra\n", encoding="utf-8")
    lines = write_lines(
        tmp_path / "b.jsonl",
        *[{"messages": [message("assistant", "quokka")], "n": 3, "text": ["wombat", None], "prompt_id": "umpire"}] * 3,
    )
    words = tokenizer.train([plain, lines], 1000, tmp_path / "out").get_vocab()
    assert {"zebra", "quokka", "wombat"} <= words.keys()
    assert not {"assistant", "umpire"} & words.keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == words
    chosen = tokenizer.train([lines], 1000, fields=["prompt_id"]).get_vocab()
    assert {"umpire", "quokka"} & chosen.keys() == {"umpire"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt_id": "a1b2"},
            r"a\.jsonl:1: expected a text in text, messages, .*, got the fields prompt_id; --field",
        ),
        ({"text": "<|im_start|>user\nhi<|im_end|>"}, r"a\.jsonl:1: text: expected plain .* \(ChatML\)"),
        ({"text": {"a": "b"}}, r"a\.jsonl:1: text: expected text, or messages with a content, got"),
        ({"chosen": [5]}, r"a\.jsonl:1: chosen: expected text, or messages with a content, got 5"),
    ],
)
def test_rows_without_text_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        tokenizer.train([write_lines(tmp_path / "a.jsonl", row)], 300)


def test_bad_input_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size: expected at least 260 .*got 259"):
        tokenizer.from_iterator(TEXTS, 259)
    with pytest.raises(UserError, match=r"vocab_size: expected at most 16777216 .*got 10000000000"):
        tokenizer.from_iterator(TEXTS, 10**10)
    with pytest.raises(UserError, match=r"vocab_size: expected a whole number, got 300\.0"):
        tokenizer.from_iterator(TEXTS, 300.0)
    with pytest.raises(UserError, match="expected at least one"):
        tokenizer.train([], 300)
    with pytest.raises(UserError, match=r"none\.txt"):
        tokenizer.train([tmp_path / "none.txt"], 300)
    with pytest.raises(UserError, match=r"none\.jsonl"):
        tokenizer.train([tmp_path / "none.jsonl"], 300)
    with pytest.raises(UserError, match=r"a\.csv: expected a file, got nothing there"):
        tokenizer.train([tmp_path / "a.csv"], 300)
    broken = tmp_path / "c.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"c\.jsonl:2: not JSON"):
        tokenizer.train([broken], 300)
    broken.write_text('{"text": "a"}\n{"text": [["b\\ud800"]]}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:2: expected valid Unicode, got a lone surrogate at character 1"):
        tokenizer.train([broken], 300)
    with pytest.raises(UserError, match="texts: expected text, got 5"):
        tokenizer.from_iterator(["a", 5], 300)
    empty = tmp_path / "d.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="expected text to train on"):
        tokenizer.train([empty], 300)
    (tmp_path / "e.txt").write_bytes("ä\n\nb".encode() + b"\xff\xfe")
    with pytest.raises(UserError, match=r"e\.txt:3: not UTF-8 at byte 1$"):
        tokenizer.train([tmp_path / "e.txt"], 300)


def test_the_chat_tokens_take_opts_free_rows():
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(50265)}, unk_token="t3"))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t2", pad_token="t1")
    assert tokenizer.add_chat_tokens(tok) == (50265, 50266)
    assert tokenizer.add_chat_tokens(tok) == (50265, 50266)
    assert len(tok) == 50267


def test_a_template_of_the_user_is_kept(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template="{{ messages }}")
    tokenizer.add_chat_tokens(tok)
    tok.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_chat_tokens(loaded)
    assert loaded.chat_template == tok.chat_template == "{{ messages }}"


def test_a_tokenizer_of_an_earlier_version_has_no_template_until_the_chat_tokens_are_added(tmp_path):
    made = tokenizer.from_iterator(TEXTS, 300, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    loaded, turns = AutoTokenizer.from_pretrained(tmp_path), conversation("hello", "It's late.")
    assert loaded.chat_template is None
    assert chat.encode(turns, loaded) == chat.encode(turns, made)
    tokenizer.add_chat_tokens(loaded)
    assert loaded.chat_template == chat.TEMPLATE
    assert loaded.get_vocab() == made.get_vocab()
    assert chat.encode(turns, loaded) == chat.encode(turns, made)


@pytest.mark.parametrize("text", ["a\n\n  b", "superuser\n\n  b", "x <|im_en", "user: a\n\n\tb", "It's  \n\nlate"])
def test_text_without_roles_and_control_tokens_is_split_as_by_byte_level(text):
    made = small_tokenizer().backend_tokenizer
    assert made.pre_tokenizer.pre_tokenize_str(text) == ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: expected a folder to save the tokenizer to, got a file"):
        tokenizer.from_iterator(TEXTS, 300, tmp_path / "file")
