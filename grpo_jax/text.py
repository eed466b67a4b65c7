"""Small rules about text that all rooms share: shortening, near names, and what can be written as UTF-8."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def shorten(text: str, limit: int) -> str:
    """The text, or its first `limit` − 1 characters and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(name: str, names: Iterable[str], n: int = 1, cutoff: float = 0.0) -> list[str]:
    """Up to `n` of the names, the most similar to the given one first.

    Args:
        name: what was written; only its first 64 characters are compared.
        cutoff: similarity below which a name is left out, from 0 (none) to 1.
    """
    return difflib.get_close_matches(name[:64], list(names), n=n, cutoff=cutoff)


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds half of a surrogate pair, which no UTF-8 file and no tokenizer takes."""
    return _LONE_SURROGATE.search(text) is not None


def replace_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
