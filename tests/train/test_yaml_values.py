"""YAML of recipes: what values mean, what is refused, and the line that an error names."""

import time

import pytest
import yaml

from dph.errors import UserError, printable
from dph.train import yaml_values
from dph.train.yaml_values import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("+5", 5), ("-7", -7), ("0", 0), ("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("1.", 1.0),
        ("-.inf", -float("inf")), ("!!float 3", 3.0), ("!!int '7'", 7), ("9" * 400, int("9" * 400)),
        ("1:30", "1:30"), ("0x10", "0x10"), ("0o7", "0o7"), ("0b1", "0b1"), ("1_000", "1_000"), ("1e", "1e"),
        ("2001-01-01", "2001-01-01"), ("'5'", "5"), ("!!str 010", "010"), ("=", "="), ("٣", "٣"),
        ("true", True), ("False", False), ("TRUE", True), ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"),
        ("null", None), ("~", None), ("", None), ("a:", {"a": None}), ("on: 1", {"on": 1}), ("1: 2", {"1": 2}),
        ("'<<': 1", {"<<": 1}), ("a: <<", {"a": "<<"}), ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("- &a {x: 1, y: 2}\n- {<<: *a, y: 3}", [{"x": 1, "y": 2}, {"x": 1, "y": 3}]),
        ("- &a {x: 1}\n- {y: 2, <<: [*a, {x: 2, z: 3}]}", [{"x": 1}, {"x": 1, "y": 2, "z": 3}]),
    ],
)  # fmt: skip
def test_values(text, value):
    parsed = parse(text, "r.yaml")
    assert (parsed, type(parsed)) == (value, type(value))


def test_not_a_number():
    assert parse(".NaN", "r.yaml") != parse(".nan", "r.yaml")


def test_an_alias_gives_a_value_of_its_own():
    one, two = parse("- &a [1]\n- *a", "r.yaml")
    one.append(2)
    assert two == [1]


NESTED = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"b{i}: &{'abcdefghij'[i + 1]} [{','.join(['*' + 'abcdefghij'[i]] * 9)}]\n" for i in range(9)
)
MERGED = "- &a {x: 1}\n" + "".join(
    f"- &{'abcdefghij'[i + 1]} {{<<: [{','.join(['*' + 'abcdefghij'[i]] * 9)}]}}\n" for i in range(9)
)
LONGEST = yaml_values.MAX_CHARACTERS


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3: the key 'a' is there twice, first in line 1"),
        ("a: {on: 1, b: {x: 1}}\nc:\n  - d: 1\n    d: 1", "r.yaml:4: the key 'd' is there twice, first in line 3"),
        ("a: 1\nb: &x\n  - *x", "r.yaml:2: expected no alias within what it names"),
        ("&x {<<: *x}", "r.yaml:1: expected no alias within what it names"),
        (NESTED, "expected at most 100000 values with the aliases replaced"),
        (MERGED, "expected at most 100000 values with the aliases replaced"),
        ("a: 1\nb: !!python/object/apply:os.system [x]", "r.yaml:2: expected no tag but .*, got !!python/object/"),
        ("!!set {a}", "r.yaml:1: expected no tag but .*, got !!set"),
        ("!!timestamp 2001-01-01", "expected no tag but .*, got !!timestamp"),
        ("!mine a", "expected no tag but .*, got !mine"),
        ("!!mine a: 1", "expected no tag but .*, got !!mine"),
        ("!!int x", "r.yaml:1: expected YAML: 'x' is not of its tag !!int"),
        ("!!int true", "'true' is not of its tag !!int"),
        ("a: 1\n---\nb: 2", "r.yaml:2: expected YAML: expected a single document"),
        ("a: 1\n\tb: 2", r"r.yaml:2: expected YAML: .*'\\t'"),
        ("a: 1\nb: \0", r"r.yaml:2: expected YAML: the character '\\x00' is not allowed"),
        ("a: *b", "r.yaml:1: expected YAML: found undefined alias 'b'"),
        ("? [a]\n: b", "r.yaml:1: expected text as a key, got a list or a section"),
        ("<<: 5", "r.yaml:1: expected a section to merge .*, got 5"),
        ("a:\n  - [", "r.yaml:2: expected YAML"),
        ("9" * 5000, "r.yaml:1: expected a number of at most 400 digits, got one of 5000"),
        ('"\\UFFFFFFFF"', "r.yaml: expected YAML"),
        ("%YAML 1." + "9" * 5000, "r.yaml: expected YAML"),
        ("[" * LONGEST, "r.yaml:1: expected at most 50 sections and lists in each other"),
        ("{" * LONGEST, "expected at most 50 sections and lists"),
        ("- " * (LONGEST // 2), "expected at most 50 sections and lists"),
        ("a" * (LONGEST + 1), f"r.yaml: expected at most {LONGEST} characters of YAML, got {LONGEST + 1}"),
    ],
    ids=lambda value: repr(value[:30]),
)  # fmt: skip
def test_what_is_refused_is_named_with_its_line_and_at_once(text, error):
    began = time.process_time()
    with pytest.raises(UserError, match=error) as caught:
        parse(text, "r.yaml")
    assert time.process_time() - began < 5
    assert printable(str(caught.value), keep="") == str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_value_on_the_command_line_has_no_line():
    with pytest.raises(UserError, match=r"^a\.b: the key 'x' is there twice, first in line 1$"):
        parse("{x: 1, x: 2}", "a.b", numbered=False)


def test_what_is_dumped_comes_back():
    value = {"a": [1, -2.5, 1e-12, True, None, "yes", "010", "1:30", "2001-01-01", "é\n\u2028", ""], "b": {"c": {}}}
    assert parse(yaml.safe_dump(value), "r.yaml") == value
