"""Random but sensible parameters for the financial tools, for `make_financial_data.py`."""

import random
import typing
from collections.abc import Callable, Sequence

import financial_phrases as phrases

from tools_funcs.financial.currency import UNITS_PER_USD
from tools_funcs.financial.states import STATES

STATED_SHARE = 0.55
UNSTATED = object()
# How much larger usual amounts are than in dollars.
SCALE = {"JPY": 150, "INR": 80, "CNY": 7, "BRL": 5}


class Draw:
    """Random values for the parameters of one row.

    Args:
        rng: the only source of randomness.
        tool: the tool that the row calls.
        row: number of the row; it picks enum values in turn, so that all of them occur.
    """

    def __init__(self, rng: random.Random, tool: Callable, row: int):
        self.rng, self.row = rng, row
        self.choices = _enum_values(tool)

    def money(self, low: int, high: int, step: int) -> int:
        return self.rng.randrange(low, high + 1, step)

    def ratio(self, low: float, high: float, step: float = 0.25) -> float:
        """A ratio whose percentage lies from `low` to `high`, a multiple of `step`."""
        steps = self.rng.randint(round(low / step), round(high / step))
        return round(steps * step / 100, 6)

    def whole(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def state(self) -> str:
        return self.rng.choice(STATES)

    def enum(self, name: str):
        values = self.choices[name]
        return values[self.row % len(values)]

    def maybe(self, value, share: float = STATED_SHARE):
        """The value, or UNSTATED."""
        return value if self.rng.random() < share else UNSTATED

    def maybe_enum(self, name: str):
        """As `maybe`, but the first rows state every value once."""
        value = self.maybe(self.enum(name))
        return self.enum(name) if self.row < len(self.choices[name]) else value

    def maybe_true(self):
        """Mostly unstated, else true more often than false."""
        return self.maybe(self.rng.random() < 0.75)

    def some(self, keys: Sequence[str], most: int) -> list[str]:
        return self.rng.sample(list(keys), self.rng.randint(1, most))


def _enum_values(tool: Callable) -> dict[str, tuple]:
    found = {}
    for name, hint in typing.get_type_hints(tool).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                found[name] = typing.get_args(part)
    return found


def sample_portfolio(draw: Draw) -> dict:
    age = draw.whole(22, 64)
    keys = draw.some(phrases.HOLDINGS, 3)
    return {
        "total_investment": draw.money(20_000, 3_000_000, 10_000),
        "risk_tolerance": draw.enum("risk_tolerance"),
        "time_horizon_years": draw.whole(2, 35),
        "current_age": age,
        "retirement_age": draw.maybe(draw.whole(max(55, age + 1), 70)),
        "income_need_percentage": draw.maybe(draw.ratio(1, 6, 0.5), 0.4),
        "existing_allocations": draw.maybe({key: draw.ratio(5, 30, 5) for key in keys}),
        "esg_preference": draw.maybe_true(),
        "tax_loss_harvesting": draw.maybe_true(),
        "rebalancing_frequency": draw.maybe_enum("rebalancing_frequency"),
        "inflation_protection": draw.maybe_true(),
        "liquidity_requirement": draw.maybe_enum("liquidity_requirement"),
    }


def sample_mortgage(draw: Draw) -> dict:
    return {
        "annual_income": draw.money(48_000, 360_000, 1_000),
        "monthly_debts": draw.maybe(draw.money(100, 1_500, 50), 0.7),
        "down_payment": draw.money(15_000, 250_000, 5_000),
        "credit_score": draw.whole(590, 830),
        "loan_type": draw.maybe_enum("loan_type"),
        "property_state": draw.state(),
        "property_tax_rate": draw.maybe(draw.ratio(0.4, 2.4, 0.1), 0.4),
        "hoa_fees": draw.maybe(draw.money(40, 600, 10)),
        "homeowners_insurance": draw.maybe(draw.money(70, 320, 5)),
        "pmi_required": draw.maybe(draw.rng.random() < 0.3, 0.4),
        "interest_rate_override": draw.maybe(draw.ratio(5, 8.5, 0.125), 0.6),
        "loan_term_years": draw.maybe_enum("loan_term_years"),
    }


def sample_tax(draw: Draw) -> dict:
    accounts = draw.some(phrases.ACCOUNTS, 2)
    loss = draw.rng.random() < 0.2
    return {
        "gross_income": draw.money(35_000, 420_000, 1_000),
        "filing_status": draw.enum("filing_status"),
        "state": draw.state(),
        "retirement_contributions": draw.maybe({key: draw.money(1_000, 7_000, 500) for key in accounts}, 0.7),
        "capital_gains_short": draw.maybe(draw.money(500, 20_000, 500), 0.35),
        "capital_gains_long": draw.maybe(draw.money(1_000, 60_000, 1_000), 0.45),
        "dividend_income_qualified": draw.maybe(draw.money(200, 9_000, 100), 0.35),
        "dividend_income_ordinary": draw.maybe(draw.money(100, 5_000, 100), 0.35),
        "itemized_deductions": draw.maybe(draw.money(8_000, 48_000, 500), 0.45),
        "dependents": draw.maybe(draw.whole(1, 4)),
        "self_employment_income": draw.maybe(draw.money(2_000, 60_000, 1_000), 0.4),
        "rental_income": draw.maybe(draw.money(1_000, 24_000, 500) * (-1 if loss else 1), 0.35),
    }


def sample_retirement(draw: Draw) -> dict:
    age = draw.whole(25, 61)
    return {
        "current_age": age,
        "retirement_age": draw.maybe(draw.whole(max(55, age + 2), 72), 0.8),
        "current_savings": draw.money(5_000, 1_500_000, 5_000),
        "annual_contribution": draw.money(2_400, 42_000, 600),
        "employer_match_percent": draw.maybe(draw.ratio(10, 100, 5)),
        "expected_return": draw.maybe(draw.ratio(4, 9, 0.5)),
        "inflation_rate": draw.maybe(draw.ratio(1.5, 4, 0.25)),
        "desired_retirement_income": draw.money(30_000, 150_000, 6_000),
        "social_security_estimate": draw.maybe(draw.money(12_000, 42_000, 600)),
        "pension_income": draw.maybe(draw.money(4_000, 36_000, 1_000), 0.35),
        "healthcare_cost_annual": draw.maybe(draw.money(3_000, 15_000, 500), 0.45),
        "life_expectancy": draw.maybe(draw.whole(80, 100), 0.5),
    }


def sample_debt(draw: Draw) -> dict:
    debts = [_debt(draw) for _ in range(draw.whole(2, 4))]
    minimums = sum(debt["minimum"] for debt in debts)
    allocation = draw.maybe_enum("extra_payment_allocation")
    strategy = draw.maybe_enum("strategy")
    offered = draw.maybe(draw.rng.random() < 0.8)
    stated = {
        "debts": debts,
        "monthly_payment_budget": (minimums // 50 + draw.whole(2, 16)) * 50,
        "strategy": strategy,
        "extra_payment_allocation": allocation,
        "consolidation_available": offered,
    }
    if allocation == "high_interest_only":
        stated["interest_rate_threshold"] = draw.maybe(draw.ratio(6, 15, 0.5), 0.7)
    if strategy == "hybrid":
        stated["credit_score_impact_weight"] = draw.maybe(draw.whole(1, 9) / 10, 0.7)
    if offered is True:
        stated["consolidation_rate"] = draw.ratio(6, 14, 0.25)
        stated["balance_transfer_fee"] = draw.maybe(draw.ratio(1, 5, 0.5))
    return stated


def _debt(draw: Draw) -> dict:
    kind = draw.rng.choice(list(phrases.DEBT_NAMES))
    low, high = {"credit_card": (16, 29), "student_loan": (3.5, 8), "auto_loan": (4, 10)}.get(kind, (8, 18))
    balance = draw.money(1_000, 30_000, 100)
    # At least the first month's interest at 24 %, as lenders ask for.
    minimum = balance // 500 * 10 + draw.money(20, 120, 10)
    return {"balance": balance, "rate": draw.ratio(low, high, 0.1), "minimum": minimum, "type": kind}


def sample_insurance(draw: Draw) -> dict:
    age = draw.whole(24, 60)
    amounts = {
        "life": draw.money(50_000, 750_000, 25_000),
        "disability": draw.money(500, 4_000, 250),
        "ltc": draw.money(1_000, 5_000, 500),
    }
    held = draw.some(amounts, 2)
    return {
        "age": age,
        "annual_income": draw.money(35_000, 260_000, 1_000),
        "dependents": draw.maybe(draw.whole(1, 5), 0.8),
        "mortgage_balance": draw.maybe(draw.money(60_000, 700_000, 5_000), 0.75),
        "other_debts": draw.maybe(draw.money(2_000, 80_000, 1_000), 0.6),
        "existing_coverage": draw.maybe({key: amounts[key] for key in amounts if key in held}, 0.6),
        "health_status": draw.maybe_enum("health_status"),
        "occupation_risk": draw.maybe_enum("occupation_risk"),
        "years_until_retirement": draw.whole(max(2, 58 - age), max(4, 70 - age)),
        "spouse_income": draw.maybe(draw.money(20_000, 150_000, 1_000) if draw.rng.random() < 0.85 else 0),
        "college_funding_need": draw.maybe(draw.money(20_000, 300_000, 10_000), 0.4),
        "final_expenses": draw.maybe(draw.money(8_000, 30_000, 1_000), 0.4),
    }


def sample_education(draw: Draw) -> dict:
    school = draw.enum("school_type")
    # Only a community college needs its years stated: the documented four are too many for it.
    years = draw.whole(1, 3) if school == "community" else draw.maybe(draw.whole(2, 6), 0.4)
    return {
        "child_current_age": draw.whole(0, 16),
        "college_start_age": draw.maybe(draw.whole(17, 20), 0.5),
        "years_of_college": years,
        "current_annual_cost": draw.maybe(draw.money(8_000, 70_000, 1_000), 0.6),
        "education_inflation_rate": draw.maybe(draw.ratio(2, 7, 0.5), 0.5),
        "current_savings": draw.maybe(draw.money(1_000, 90_000, 500), 0.75),
        "monthly_contribution": draw.maybe(draw.money(50, 1_200, 25), 0.8),
        "expected_return": draw.maybe(draw.ratio(3, 9, 0.5), 0.5),
        "financial_aid_expected": draw.maybe(draw.money(1_000, 7_500, 500), 0.4),
        "student_contribution_percent": draw.maybe(draw.ratio(5, 50, 5), 0.4),
        "state_residency": draw.state(),
        "school_type": school,
    }


def sample_currency(draw: Draw) -> dict:
    currencies = draw.choices["base_currency"]
    # Three places that never meet; over ten rows every currency takes each of them.
    place, turn = draw.row % 10, draw.row // 10
    base = currencies[place]
    target = currencies[(place + 1 + turn % 9) % 10]
    middle = currencies[(place + 1 + (turn + 4) % 9) % 10]
    hedge = draw.maybe_enum("hedging_strategy")
    months = UNSTATED if hedge is UNSTATED else draw.whole(1, 24)
    units = SCALE.get(base, 1)
    return {
        "base_currency": base,
        "target_currency": target,
        "amount": draw.money(1_000, 250_000, 500) * units,
        "exchange_method": draw.maybe_enum("exchange_method"),
        "transfer_fee_percent": draw.maybe(draw.ratio(0.25, 3, 0.25)),
        "transfer_fee_fixed": draw.maybe(draw.money(5, 60, 5) * units),
        "intermediate_currency": middle if draw.row < 10 else draw.maybe(middle, 0.35),
        "spot_rate_override": draw.maybe(_quote(draw, base, target), 0.35),
        "forward_contract_months": months,
        "hedging_strategy": hedge,
        "tax_reporting_required": draw.maybe_true(),
    }


def _quote(draw: Draw, base: str, target: str) -> float:
    """What a dealer may offer: 5 % below to 2 % above the market rate, with four digits."""
    market = UNITS_PER_USD[target] / UNITS_PER_USD[base]
    return float(f"{market * draw.rng.uniform(0.95, 1.02):.4g}")


SAMPLERS = {
    "calculate_portfolio_allocation": sample_portfolio,
    "calculate_mortgage_affordability": sample_mortgage,
    "optimize_tax_strategy": sample_tax,
    "calculate_retirement_readiness": sample_retirement,
    "analyze_debt_payoff_strategy": sample_debt,
    "calculate_insurance_needs": sample_insurance,
    "calculate_education_funding": sample_education,
    "calculate_currency_exchange_arbitrage": sample_currency,
}
