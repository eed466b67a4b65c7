"""Argument checks, number formats and the two annuity formulas of the financial tools.

A check returns None, or the sentence that tells a model what is allowed.
"""

from collections.abc import Collection
from typing import Any

LARGEST_AMOUNT = 1_000_000_000_000


def first_error(*problems: str | None) -> str | None:
    """The line `Error: …` of the first failed check; None when all passed."""
    return next((f"Error: {problem}" for problem in problems if problem), None)


def number(name: str, value: Any, low: float, high: float, *, null_ok: bool = False) -> str | None:
    """A number (no boolean, no NaN) from `low` to `high`."""
    if value is None and null_ok:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"{name} must be a number from {low:,.15g} to {high:,.15g}{' or null' if null_ok else ''}, got {short(value)}"


def amount(name: str, value: Any, *, null_ok: bool = False) -> str | None:
    """An amount of money that is not negative."""
    return number(name, value, 0, LARGEST_AMOUNT, null_ok=null_ok)


def positive(name: str, value: Any) -> str | None:
    """An amount of money of at least one cent."""
    return number(name, value, 0.01, LARGEST_AMOUNT)


def whole(name: str, value: Any, low: int, high: int) -> str | None:
    """A whole number from `low` to `high`."""
    if number(name, value, low, high) is None and value == int(value):
        return None
    return f"{name} must be a whole number from {low} to {high}, got {short(value)}"


def choice(name: str, value: Any, allowed: Collection) -> str | None:
    """One of a fixed set of values."""
    # Compared one by one: a list or dict from a model cannot be hashed.
    if not isinstance(value, bool) and any(value == one for one in allowed):
        return None
    return f"{name} must be one of {', '.join(map(str, allowed))}, got {short(value)}"


def flag(name: str, value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else f"{name} must be true or false, got {short(value)}"


def table(name: str, value: Any, limits: dict[str, float]) -> str | None:
    """An object whose keys are among those of `limits`, each value from 0 to its limit."""
    if not isinstance(value, dict):
        return f"{name} must be an object with keys among {', '.join(limits)}, got {short(value)}"
    for key, entry in value.items():
        problem = choice(f"each key of {name}", key, limits) or number(f"{name}.{key}", entry, 0, limits[key])
        if problem:
            return problem
    return None


def short(value: Any) -> str:
    """The value as text of at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def usd(value: float) -> str:
    """Whole dollars: 1234.5 → "$1,234"."""
    whole_dollars = round(value)
    return f"-${-whole_dollars:,}" if whole_dollars < 0 else f"${whole_dollars:,}"


def percent(ratio: float, digits: int = 1) -> str:
    """A ratio as a percentage: 0.065 → "6.5%"."""
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(ratio * 100, digits) + 0.0:.{digits}f}%"


def annuity_present_value(rate: float, periods: float) -> float:
    """Value today of 1 paid at the end of each period: (1 − (1 + r)^−n) / r."""
    return periods if rate == 0 else (1 - (1 + rate) ** -periods) / rate


def annuity_future_value(rate: float, periods: float) -> float:
    """Value at the end of 1 paid at the end of each period: ((1 + r)^n − 1) / r."""
    return periods if rate == 0 else ((1 + rate) ** periods - 1) / rate
