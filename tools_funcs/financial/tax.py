"""Income tax of one year: federal brackets, capital gains, self-employment and state tax (2024)."""

import math
from typing import Literal

from tools_funcs.financial.common import (
    LARGEST_AMOUNT,
    amount,
    choice,
    first_error,
    number,
    percent,
    table,
    usd,
    whole,
)
from tools_funcs.financial.states import INCOME_TAX, STATES

# Federal figures for tax year 2024 (IRS Rev. Proc. 2023-34); each bracket is (upper end, rate).
RATES = (0.10, 0.12, 0.22, 0.24, 0.32, 0.35, 0.37)
BRACKET_ENDS = {
    "single": (11_600, 47_150, 100_525, 191_950, 243_725, 609_350, math.inf),
    "married": (23_200, 94_300, 201_050, 383_900, 487_450, 731_200, math.inf),
    "head": (16_550, 63_100, 100_500, 191_950, 243_700, 609_350, math.inf),
}
GAIN_RATES = (0.0, 0.15, 0.20)
GAIN_ENDS = {
    "single": (47_025, 518_900, math.inf),
    "married": (94_050, 583_750, math.inf),
    "head": (63_000, 551_350, math.inf),
}
STANDARD_DEDUCTION = {"single": 14_600, "married": 29_200, "head": 21_900}
CHILD_CREDIT = 2_000
CHILD_CREDIT_ENDS = {"single": 200_000, "married": 400_000, "head": 200_000}
WAGE_BASE = 168_600
LIMIT_401K = 23_000
# The limits with the catch-up contributions of older savers.
CONTRIBUTION_LIMITS = {
    "traditional_401k": 30_500,
    "roth_401k": 30_500,
    "traditional_ira": 8_000,
    "roth_ira": 8_000,
    "hsa": 9_300,
}
PRE_TAX = ("traditional_401k", "traditional_ira", "hsa")


def optimize_tax_strategy(
    gross_income: float,
    filing_status: Literal["single", "married", "head"],
    state: str,
    retirement_contributions: dict[str, float],
    capital_gains_short: float,
    capital_gains_long: float,
    dividend_income_qualified: float,
    dividend_income_ordinary: float,
    itemized_deductions: float,
    dependents: int,
    self_employment_income: float,
    rental_income: float,
) -> str:
    """Compute US income taxes of tax year 2024 (federal, self-employment, state), the effective and marginal rate and what filling up the 401(k) saves. For questions about how much tax someone owes or how to lower it. Amounts in US dollars.

    Args:
        gross_income: Wages and salary per year before deductions. Write "150k" as 150000.
        filing_status: single: filing alone. married: married filing jointly. head: head of household.
        state: Two-letter code of the US state of residence, such as "TX" for Texas.
        retirement_contributions: Dollars paid into each account this year. Keys: traditional_401k, roth_401k, traditional_ira, roth_ira, hsa. Only traditional accounts and the HSA lower the tax. A plain "401k" is traditional_401k, a plain "IRA" traditional_ira. Example: {"traditional_401k": 15000}. If not stated: {}.
        capital_gains_short: Gains on assets held for up to a year. If not stated: 0.
        capital_gains_long: Gains on assets held for over a year. If not stated: 0.
        dividend_income_qualified: Qualified dividends, taxed like long-term gains. If not stated: 0.
        dividend_income_ordinary: Ordinary (non-qualified) dividends and interest. If not stated: 0.
        itemized_deductions: Sum of mortgage interest, charity, state and local taxes; the standard deduction is used when larger. If not stated: 0.
        dependents: Children under 17, 0 to 10. If not stated: 0.
        self_employment_income: Net profit of a business, freelancing or side work; a loss is negative. If not stated: 0.
        rental_income: Net rent after costs; a loss is negative. If not stated: 0.

    Returns:
        One line: taxes, rates, deduction used, one idea.
    """
    error = first_error(
        amount("gross_income", gross_income),
        choice("filing_status", filing_status, BRACKET_ENDS),
        choice("state", state, STATES),
        table("retirement_contributions", retirement_contributions, CONTRIBUTION_LIMITS),
        amount("capital_gains_short", capital_gains_short),
        amount("capital_gains_long", capital_gains_long),
        amount("dividend_income_qualified", dividend_income_qualified),
        amount("dividend_income_ordinary", dividend_income_ordinary),
        amount("itemized_deductions", itemized_deductions),
        whole("dependents", dependents, 0, 10),
        number("self_employment_income", self_employment_income, -LARGEST_AMOUNT, LARGEST_AMOUNT),
        number("rental_income", rental_income, -LARGEST_AMOUNT, LARGEST_AMOUNT),
    )
    if error:
        return error

    business_tax = _self_employment_tax(self_employment_income, gross_income)
    pre_tax = sum(retirement_contributions.get(account, 0) for account in PRE_TAX)
    ordinary = gross_income + capital_gains_short + dividend_income_ordinary
    ordinary += self_employment_income + rental_income
    preferred = capital_gains_long + dividend_income_qualified
    adjusted = max(0.0, ordinary + preferred - pre_tax - business_tax / 2)
    deduction = max(STANDARD_DEDUCTION[filing_status], itemized_deductions)
    taxable = max(0.0, adjusted - deduction)

    ends = BRACKET_ENDS[filing_status]
    ordinary_taxable = max(0.0, taxable - preferred)
    federal = _bracket_tax(0.0, ordinary_taxable, ends, RATES)
    # Gains lie on top of the ordinary income and fill the brackets from there.
    federal += _bracket_tax(ordinary_taxable, taxable, GAIN_ENDS[filing_status], GAIN_RATES)
    federal -= min(federal, _child_credit(dependents, adjusted, CHILD_CREDIT_ENDS[filing_status]))
    state_tax = taxable * INCOME_TAX[state]

    marginal = next(rate for end, rate in zip(ends, RATES, strict=True) if ordinary_taxable <= end)
    income = max(0.0, ordinary + preferred)
    total = federal + business_tax + state_tax
    used = "itemized" if itemized_deductions > STANDARD_DEDUCTION[filing_status] else "standard"
    return (
        f"Total Tax: {usd(total)} (Federal {usd(federal)}, Self-Employment {usd(business_tax)}, "
        f"State {usd(state_tax)}), Effective Rate: {percent(total / income if income else 0.0)}, "
        f"Marginal Rate: {marginal:.0%}, Deduction: {used}, "
        f"Idea: {_idea(gross_income, ordinary_taxable, retirement_contributions, ends)}"
    )


def _bracket_tax(start: float, end: float, ends: tuple, rates: tuple) -> float:
    """Tax on the income between `start` and `end`, each part at the rate of its bracket."""
    tax, lower = 0.0, 0.0
    for upper, rate in zip(ends, rates, strict=True):
        tax += rate * max(0.0, min(end, upper) - max(start, lower))
        lower = upper
    return tax


def _self_employment_tax(profit: float, wages: float) -> float:
    """12.4 % up to the wage base that wages leave free, 2.9 % without limit, on 92.35 % of the profit."""
    base = max(0.0, profit) * 0.9235
    return 0.124 * min(base, max(0.0, WAGE_BASE - wages)) + 0.029 * base


def _child_credit(children: int, income: float, phase_out: float) -> float:
    """2,000 dollars a child, less 50 for each started 1,000 of income over the limit."""
    over = math.ceil(max(0.0, income - phase_out) / 1_000)
    return max(0.0, CHILD_CREDIT * children - 50 * over)


def _idea(wages: float, taxable: float, contributions: dict[str, float], ends: tuple) -> str:
    used = contributions.get("traditional_401k", 0) + contributions.get("roth_401k", 0)
    room = min(LIMIT_401K - used, wages - used, taxable)
    if room <= 0:
        return "none"
    saved = _bracket_tax(taxable - room, taxable, ends, RATES)
    return f"add {usd(room)} to a traditional 401(k) and save {usd(saved)}"
