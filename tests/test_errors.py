"""Text of unknown origin, made safe to print."""

import pytest

from dph.errors import printable


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
