"""Values as JSON has them."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pytest

from grpo_jax.files import plain


def test_plain_takes_numbers_out_of_arrays():
    assert plain({1: (np.array([1.0, np.nan]), np.bool_(True), None, "x")}) == {
        "1": [[1.0, None], True, None, "x"]
    }


class Broken:
    """An object whose text fails."""

    def __str__(self):
        raise RuntimeError


class Pretends:
    """An object with every attribute, as a mock."""

    def __getattr__(self, name):
        return lambda: self

    def __str__(self):
        return "pretends"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({1}, "{1}"),
        (datetime.date(2024, 2, 3), "2024-02-03"),
        (Decimal("0.10"), "0.10"),
        (1 + 2j, "(1+2j)"),
        (b"raw", "b'raw'"),
        (Broken(), "<Broken>"),
        (Pretends(), "pretends"),
        (10**5000, "<int>"),  # Python refuses to write it
        (np.datetime64("2024-02-03"), "2024-02-03"),
        (np.array([{1}, None], object), ["{1}", None]),
        ({(1, 2): {3: {4}}, Broken(): 1}, {"(1, 2)": {"3": "{4}"}, "<Broken>": 1}),
        ("half \ud83d", "half \ufffd"),
        (np.float32("nan"), None),
        (np.str_("text"), "text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_no_type_for_becomes_text(value, expected):
    assert plain(value) == expected
    json.dumps(plain(value), ensure_ascii=False).encode()


def test_what_holds_itself_becomes_text():
    ring = []
    ring.append(ring)
    assert plain(ring) == "[[...]]"
