"""YAML: numbers are those of version 1.2, what is written is read back, nothing that is typed is a traceback."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.errors import LONGEST_LINE, ScorerayError, UserError, readable, shortened
from scoreray.data.yaml_text import MAX_BYTES, dump_yaml, parse_value, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("+1", 1), ("-7", -7), ("010", 10), ("0o10", 8),
        ("0x1F", 31), ("089", 89), ("-.inf", -math.inf), ("~", None), ("", None), ("Null", None), ("true", True),
        ("False", False), ("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("y", "y"), ("1:30", "1:30"),
        ("2024-13-45", "2024-13-45"), ("2024-01-02", "2024-01-02"), ("1_000", "1_000"), ("1e", "1e"), (".", "."),
        ("-0o7", "-0o7"), ("'1'", "1"), ('"true"', "true"), ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}),
        ("\ufeffa: |\n  b\n", {"a": "b\n"}), ("'1': x", {"1": "x"}), ("- 1\n-\n  - [2, {}]", [1, [[2, {}]]]),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "c.yaml")
    assert found == value
    assert type(found) is type(value)
    assert parse_yaml(text.encode(), "c.yaml") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {a: 1}\nx: y\nrun: {}", "line 3, column 1: key 'run' stands here again, after line 1; keep one"),
        ("a:\n  b: 1\n  'b': 2", "line 3, column 3: key 'b' stands here again, after line 2"),
        ("1: x", "line 1, column 1: a key must be a name, and 1 is none; put it in quotes"),
        ("true: x", "and true is none"),
        ("? \n: x", "and nothing is none"),
        ("[1]: x", "a key must be a name, this is a mapping or a list"),
        ("? {a: 1}\n: x", "a key must be a name"),
        ("a: &k b\n*k : x", "a key must be a name, this is an alias"),
        ("x: " + "9" * 5000, r"line 1, column 4: 9{80}\.\.\. \(5,000 characters\) is too long for a number"),
        ("1e999", "1e999 is too large for a number"),
        ("1e-999", "1e-999 is too small for a number"),
        ('!!int "abc"', "tag !!int: tags are not read"),
        ("!!python/object/apply:os.system [true]", "tag !!python/object/apply:os.system: tags"),
        ("[!%0a%0ab 1]", "tag ! b: tags are not read"),
        ("a: !mine 1", "line 1, column 4: tag !mine"),
        ("[1", "not YAML: line 1, column 3"),
        ("{", "not YAML: line 1, column 2"),
        ("%40", "not YAML: line 1"),
        ("@1", "not YAML: line 1, column 1"),
        ("*x", r"alias '\*x' has no anchor; text that begins with \* needs quotes"),
        ("a: &x {b: *x}", r"'\*x' stands within itself"),
        ("a: {<<: 3}", "<< takes a mapping"),
        ("a\n---\nb", "line 2, column 1: a second document"),
        ("%YAML 1.1\n--- a", "%YAML names another version"),
        ("a: \x01", r"at character 4: U\+0001 can't be in it"),
        ("a: \x00", r"at character 4: U\+0000"),
        (r'"\0"', "a character that no text has"),
        (r'"\ud800"', "a character that no text has"),
        (r'"\U00110000"', "not YAML"),
        (b"\xff\xfea\x00", "not UTF-8 text, at byte 0"),
        (b"a: caf\xe9", "not UTF-8 text, at byte 6"),
        ("[" * 20_000, "nested too deeply"),
        ("- " * 1000, "nested too deeply"),
        ("a: [" + "1, " * 10_001 + "]", "more than 10000 values"),
        ("#" * (MAX_BYTES + 1), "larger than 1 MiB"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_of_a_config_is_one_line_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"^c.yaml: .*{message}") as caught:
        parse_yaml(text, "c.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_a_word_of_a_command_line_that_is_a_comment_is_not_taken_for_nothing() -> None:
    assert parse_value("", "'a='") is None
    with pytest.raises(UserError, match="what follows # is a comment"):
        parse_value("#x", "'a=#x'")
    with pytest.raises(UserError, match="needs quotes"):
        parse_value("%40", "'a=%40'")


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
numbers = st.from_regex(
    r"[-+]?[0-9]{0,4}\.?[0-9]{0,4}([eE][-+]?[0-9]{1,3})?|0[ox][0-9a-f]{1,4}|[0-9]:[0-9]{2}", fullmatch=True
)
words = st.sampled_from(
    ["yes", "No", "on", "off", "y", "n", "~", "null", "true", "True", ".inf", "-.INF", ".nan", "2024-01-01", "1_000",
     "<<", "=", "*a", "&a", "!x", "%a", "@a", "`", "-", "?", ":", "#", "089", "1e-3", "0o10"]
)  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats(allow_nan=False) | names | numbers | words
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | words, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(values)
def test_what_is_written_is_read_back_equal_by_this_and_by_yaml_1_1(value: Any) -> None:
    text = dump_yaml(value)
    assert parse_yaml(text, "") == value
    assert yaml.safe_load(text) == value


PIECES = (
    "a: 1\n", "- ", "? ", ": ", "{", "}", "[", "]", ",", "'", '"', "|\n", ">\n  ", "&a ", "*a ", "!!int ", "!x ", "%",
    "@", "`", "#", "---\n", "...\n", "%YAML 1.2\n", "%TAG ! x\n", "<<: ", "\t", "\n", "  ", "\\x", "\\u12",
    "\\UFFFFFFFF", "\x85", "\u2028", "\ufeff", "\x00", "\x1b", "1e5", "0o8", "9" * 60, "~", "=", "2024-99-99", ".inf",
    "é", "💥", "a" * 200,
)  # fmt: skip


def test_five_thousand_strange_texts_are_read_or_refused_in_one_line() -> None:
    rng = random.Random(0)
    refused = []
    for _ in range(5000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        data = text.encode()
        if rng.random() < 0.3:
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(rng.randint(0, 3)) + data[at + rng.randint(0, 2) :]
        try:
            parse_yaml(data, "c.yaml")
        except UserError as error:
            refused.append(str(error))
    assert 1000 < len(refused) < 4500
    assert all(line.startswith("c.yaml: ") and len(line) < 500 and len(line.splitlines()) == 1 for line in refused)


def test_messages_echo_the_beginning_of_what_is_long() -> None:
    long = "x" * 100_000
    assert shortened("short") == "short"
    assert shortened(long, 10) == "x" * 10 + "... (100,000 characters)"
    assert len(str(ScorerayError(f"key: {long} is wrong"))) < 200
    assert str(ScorerayError(f"key: {long} is wrong")).endswith("characters) is wrong")
    assert len(readable("a b " * 100_000)) < LONGEST_LINE + 50
    assert readable("one\n" * 100_000).splitlines()[-1] == "... (99,801 more lines)"
    assert readable("a\x1b[31mb\nc") == "a\\x1b[31mb\nc"
    assert str(UserError("/a/path/" + "d" * 300)) == "/a/path/" + "d" * 300
