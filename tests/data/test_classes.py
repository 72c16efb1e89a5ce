"""Which class a label names, and how classes are numbered: never another one than was meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.classes import class_number, in_order
from scoreray.data.errors import UserError

TEXT_ORDER = tuple(sorted(str(i) for i in range(12)))  # 0, 1, 10, 11, 2, ...: of a data set that was packed as text


def test_a_number_is_an_index_and_a_word_is_a_name_first() -> None:
    for index in (2, np.int64(2), torch.tensor(2), "index:2", "name:10"):
        assert class_number(index, TEXT_ORDER) == 2, "the class called 10"
    assert class_number("name:2", TEXT_ORDER) == 4
    assert class_number("0", TEXT_ORDER) == 0, "name and number are the same class"
    names = [str(i) for i in range(12)]
    assert [class_number(name, names) for name in names] == list(range(12))
    assert class_number("3", ("cat", "dog", "owl", "ant")) == 3
    assert class_number("1", ("7", "8")) == class_number("8", ("7", "8")) == 1
    assert [class_number(none, names) for none in (None, -1, "-1")] == [-1] * 3


def test_a_word_that_is_the_name_of_one_and_the_number_of_another_is_refused_with_the_way_to_both() -> None:
    with pytest.raises(UserError, match=r"class '2' fits 2 classes: give 'index:2' for class 2 \(called '10'\); "
                       r"'name:2' for class 4 \(called '2'\)"):  # fmt: skip
        class_number("2", TEXT_ORDER)
    with pytest.raises(UserError, match=r"'index:-1' for no class; 'name:-1' for class 0 \(called '-1'\)"):
        class_number("-1", ("-1", "1"))
    with pytest.raises(UserError, match=r"'index:0' for class 0 \(called 'crane'\); 'index:2' for class 2"):
        class_number("crane", ("crane", "x", "crane"))  # ImageNet has two


def test_exact_case_comes_before_any_case() -> None:
    classes = ("Cat", "cat", "dog", "Stra\u00dfe", "cafe\u0301")
    assert [class_number(name, classes) for name in ("Cat", "cat", "DOG", "STRASSE", "caf\u00e9")] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"class 'CAT' fits 2 classes: give 'Cat' for class 0.*; 'cat' for class 1"):
        class_number("CAT", classes)


ODD = [
    *("²", "٣", "５", "--5", "+5", " 5", "5 ", "1_0", "05", "0x1", "1e0", "1.0", "", "-", "-2", "12", "9" * 5000),
    *("\n", "\0", "index:", "index:05", "index:²", "index:-2", "name:", "name:x"),
    *(12, -2, 10**30, True, 1.0, b"1", [1]),
]


@pytest.mark.parametrize("label", ODD, ids=[repr(label)[:20] for label in ODD])
def test_what_is_no_name_and_no_number_is_one_line(label: object) -> None:
    for classes in (TEXT_ORDER, ("cat", "dog"), ()):
        with pytest.raises(UserError) as caught:
            class_number(label, classes)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_a_thousand_classes_are_not_all_listed() -> None:
    with pytest.raises(
        UserError, match=r"did you mean 'class-999'\? .* \.\.\. \(1,000 in all\); or 0 to 999"
    ) as caught:
        class_number("klass-999", [f"class-{i}" for i in range(1000)])
    assert len(str(caught.value)) < 1000


def test_names_that_are_all_numbers_are_numbered_as_numbers() -> None:
    assert in_order(["10", "9", "2", "10", "0"]) == ["0", "2", "9", "10"]
    assert in_order(["5", "05", "-1", "10"]) == ["-1", "05", "5", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert in_order(["²", "10", "9"]) == ["10", "9", "²"]


words = st.sampled_from(["0", "1", "2", "3", "10", "-1", "05", "²", "٣", "Cat", "cat", "CAT", "index:1", "name:1",
                         "index:cat", "name:cat", ":", "name:", "index:", ""]) | st.text(max_size=4)  # fmt: skip


@settings(max_examples=300, derandomize=True)
@given(st.lists(words.filter(len), max_size=6), words)
def test_any_word_asks_for_one_class_or_is_refused_and_every_class_can_be_asked_for(
    classes: list[str], word: str
) -> None:
    fits = [i for i, name in enumerate(classes) if name == word]
    fits += [int(word)] if word in ("-1", *map(str, range(len(classes)))) else []
    found, refusal = None, ""
    try:
        found = class_number(word, classes)
    except UserError as error:
        refusal = str(error)
    assert refusal.isprintable()
    if found is None:
        assert len(set(fits)) != 1 or word.startswith(("name:", "index:"))
    else:
        assert -1 <= found < len(classes)
        assert word not in classes or classes[found] == word, "never another class than the one of this name"
    for number, name in enumerate(classes):
        assert class_number(number, classes) == number
        if classes.count(name) == 1 and f"name:{name}" not in classes:
            assert class_number(f"name:{name}", classes) == number
        if f"index:{number}" not in classes:
            assert class_number(f"index:{number}", classes) == number
