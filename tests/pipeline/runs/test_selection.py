"""Expressions over columns: what they choose is what Python would, and nothing else is run."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palindrome.pipeline.runs.selection import Selection, parse

ROWS = [
    {"image_id": f"{i}.png", "label": i % 5 if i % 7 else None, "mse": i / 10, "good": i % 2 == 0, "caption": f"a {i}"}
    for i in range(40)
]
TABLE = pa.Table.from_pylist(ROWS)


def chosen(text):
    return TABLE.filter(parse(text, TABLE.schema))["image_id"].to_pylist()


@pytest.mark.parametrize(
    "text",
    [
        "mse < 1",
        "1 <= mse < 2.5",
        "good",
        "not good and mse >= 3",
        "caption == 'a 7'",
        "image_id in ('3.png', '4.png') or mse > 3.8",
        "image_id not in ['3.png']",
        "mse != -0.5",
    ],
)
def test_rows_are_those_that_python_would_choose(text):
    assert chosen(text) == [row["image_id"] for row in ROWS if eval(text, {}, row)]


def test_what_is_none_is_neither_equal_nor_unequal():
    assert chosen("label is None") == [row["image_id"] for row in ROWS if row["label"] is None]
    assert chosen("label is not None and label != 3") == chosen("label != 3")


NUMBERS = st.integers(-3, 45)
TERMS = st.builds(lambda op, n: f"mse {op} {n / 10}", st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), NUMBERS)
TERMS |= st.sampled_from(["good", "not good"])
EXPRESSIONS = st.recursive(TERMS, lambda t: st.builds("({} {} {})".format, t, st.sampled_from(["and", "or"]), t))


@given(EXPRESSIONS)
def test_any_nesting(text):
    assert chosen(text) == [row["image_id"] for row in ROWS if eval(text, {}, row)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nosuch == 1", "'nosuch' is not a column"),
        ("mse <", "is not an expression"),
        ("", "is not an expression"),
        ("__import__('os').system('true') == 0", "__import__"),
        ("mse.__class__ == 1", "mse.__class__"),
        ("(lambda: 1)() == mse", "lambda"),
        ("mse + 1 > 2", "mse + 1"),
        ("mse", "is not true or false"),
        ("mse == 'text'", "mse == 'text'"),
        ("label is 3", "is not None"),
        ("3 in label", "is not a column"),
        ("(" * 500 + "mse < 1" + ")" * 500, "is not an expression"),
    ],
)
def test_what_is_no_such_expression_is_refused_by_name(text, named):
    with pytest.raises(ValueError) as info:
        parse(text, TABLE.schema)
    assert named in str(info.value)


def test_ids_and_an_expression_together():
    both = Selection(("2.png", "3.png", "none"), "good").expression(TABLE.schema)
    assert TABLE.filter(both)["image_id"].to_pylist() == ["2.png"]
    assert Selection().expression(TABLE.schema) is None
