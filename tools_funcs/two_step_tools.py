"""Four small calculators whose results feed one another: the tools of the two-step job.

Amounts are plain numbers; each result is one line with one number, which the next call
can take as its `amount`. Impossible input gives a line that begins with `Error:`.
"""

from typing import Literal

from tools_funcs.financial.common import annuity_present_value, choice, first_error, number, positive, whole

# Units per US dollar, a fixed table.
UNITS_PER_USD = {"USD": 1.0, "EUR": 0.92, "GBP": 0.79, "JPY": 150.0, "CHF": 0.88, "CAD": 1.36}


def grow_savings(amount: float, annual_rate: float, years: int) -> str:
    """Value of a deposit after some years with yearly compound interest.

    Args:
        amount: Money deposited now.
        annual_rate: Interest per year as a ratio from 0 to 0.20 (5% is 0.05).
        years: Whole years, 1 to 60.

    Returns:
        One line such as "Future Value: 1102.50".
    """
    error = first_error(
        positive("amount", amount), number("annual_rate", annual_rate, 0, 0.20), whole("years", years, 1, 60)
    )
    return error or f"Future Value: {amount * (1 + annual_rate) ** years:.2f}"


def convert_currency(
    amount: float,
    from_currency: Literal["USD", "EUR", "GBP", "JPY", "CHF", "CAD"],
    to_currency: Literal["USD", "EUR", "GBP", "JPY", "CHF", "CAD"],
) -> str:
    """Convert money at the day's middle rate.

    Args:
        amount: Money in from_currency.
        from_currency: Currency of the amount.
        to_currency: Currency wanted.

    Returns:
        One line such as "Converted Amount: 920.00".
    """
    error = first_error(
        positive("amount", amount),
        choice("from_currency", from_currency, UNITS_PER_USD),
        choice("to_currency", to_currency, UNITS_PER_USD),
    )
    if error:
        return error
    return f"Converted Amount: {amount / UNITS_PER_USD[from_currency] * UNITS_PER_USD[to_currency]:.2f}"


def monthly_loan_payment(amount: float, annual_rate: float, years: int) -> str:
    """Monthly payment of a loan that is repaid in equal parts.

    Args:
        amount: Money borrowed.
        annual_rate: Interest per year as a ratio from 0 to 0.20 (6.5% is 0.065).
        years: Whole years until it is repaid, 1 to 40.

    Returns:
        One line such as "Monthly Payment: 599.55".
    """
    error = first_error(
        positive("amount", amount), number("annual_rate", annual_rate, 0, 0.20), whole("years", years, 1, 40)
    )
    return error or f"Monthly Payment: {amount / annuity_present_value(annual_rate / 12, 12 * years):.2f}"


def take_share(amount: float, share: float) -> str:
    """A share of an amount, such as a tax, a tip, a down payment or a fee.

    Args:
        amount: The whole.
        share: Ratio of it, from 0 to 1 (20% is 0.2).

    Returns:
        One line such as "Share: 250.00".
    """
    error = first_error(positive("amount", amount), number("share", share, 0, 1))
    return error or f"Share: {amount * share:.2f}"


TOOL_FUNCTIONS = [grow_savings, convert_currency, monthly_loan_payment, take_share]
