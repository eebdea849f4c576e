"""Text that grows: no half character, no beginning of a stop text."""

import pytest

from dph.serve.text_stream import TextStream

END = 999


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, tokens, skip_special_tokens):
        assert END not in tokens
        assert not skip_special_tokens
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("añb", (), ["a", "", "ñ", "b", ""]),
        ("😀!", (), ["", "", "", "😀", "!", ""]),
        ("a STOx", ("STOP",), ["a", " ", "", "", "", "STOx", ""]),
        ("aabx", ("abc", "aac"), ["", "", "a", "abx", ""]),
    ],
)
def test_pieces(text, stop, pieces):
    stream, tokens, got = TextStream(Bytes(), END, stop), list(text.encode()), []
    for i in range(1, len(tokens) + 1):
        got.append(stream.add(tokens[:i]))
    assert stream.add([*tokens, END]) == ""
    assert [*got, stream.finish(text)] == pieces


def test_bytes_that_are_no_character_come_with_the_end():
    stream = TextStream(Bytes(), END)
    assert stream.add([97, 0xF0, 0x9F]) == "a"
    assert stream.finish("a\ufffd") == "\ufffd"
    with pytest.raises(RuntimeError, match="only grows"):
        stream.finish("b")
