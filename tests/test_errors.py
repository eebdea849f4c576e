"""Text of unknown origin, made safe to print."""

import pytest

from dph.errors import printable, shown, shown_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ünïcode, 漢字, 🙂\n\tkept", "plain, ünïcode, 漢字, 🙂\n\tkept"),
        ("\x1b[31mred\x1b[0m\r", "\\x1b[31mred\\x1b[0m\\r"),
        ("\x9b2J\x7f\x00\x85", "\\x9b2J\\x7f\\x00\\x85"),
        ("safe\u202etxt.exe\u2028", "safe\\u202etxt.exe\\u2028"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_control_characters_are_escaped(text, expected):
    assert printable(text) == expected
    printable(text).encode()


def test_a_line_keeps_no_end_of_line():
    assert printable("a\nb\tc", keep="") == "a\\nb\\tc"


def test_values_in_messages_are_short_and_on_one_line():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    huge = (
        "x" * 10**6,
        10**5000,
        deep,
        {"a\n\x1b": ["b" * 500] * 50},
        [[10**5000]],
        "\ud800\u202e",
        list(range(10**5)),
    )
    for value in huge:
        text = shown(value)
        assert len(text) < 130
        assert printable(text, keep="") == text
        text.encode()
    assert (shown(None), shown(True), shown("a"), shown([1, "b"])) == ("None", "True", "'a'", "[1, 'b']")


def test_names_in_messages_are_cut():
    assert shown_names([]) == "(none)"
    assert shown_names(["a", 5, "b\n"]) == "a, 5, b\\n"
    assert shown_names(str(i) for i in range(10**5)) == ", ".join(map(str, range(12))) + ", ..."
    assert shown_names(["x" * 1000]) == "x" * 40 + "..."
