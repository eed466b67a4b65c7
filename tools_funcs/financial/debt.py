"""Debt payoff: a month-by-month simulation of avalanche, snowball and hybrid plans."""

from typing import Any, Literal, NamedTuple

from tools_funcs.financial.common import (
    LARGEST_AMOUNT,
    choice,
    first_error,
    flag,
    number,
    percent,
    positive,
    short,
    usd,
)

DEBT_TYPES = ("credit_card", "student_loan", "auto_loan", "personal_loan")
STRATEGIES = ("avalanche", "snowball", "hybrid")
ALLOCATIONS = ("single_focus", "proportional", "high_interest_only")
MOST_DEBTS = 20
MOST_MONTHS = 600
# Less than half a cent is paid.
PAID = 0.005


class Plan(NamedTuple):
    """How the budget is used."""

    budget: float  # dollars a month
    strategy: str
    allocation: str
    threshold: float
    score_weight: float


class Payoff(NamedTuple):
    """What a plan costs; interest in dollars."""

    months: int
    interest: float


def analyze_debt_payoff_strategy(
    debts: list[dict],
    monthly_payment_budget: float,
    strategy: Literal["avalanche", "snowball", "hybrid"],
    extra_payment_allocation: Literal["single_focus", "proportional", "high_interest_only"],
    interest_rate_threshold: float,
    consolidation_available: bool,
    consolidation_rate: float | None,
    balance_transfer_fee: float,
    credit_score_impact_weight: float,
) -> str:
    """Simulate month by month how debts are paid off with a fixed budget: months, interest, first target, and whether consolidation is cheaper. For questions about paying off cards and loans. Amounts in US dollars.

    Args:
        debts: One object per debt, in the order of the text, with the keys balance, rate (interest per year as a ratio: 22.9% APR is 0.229), minimum (smallest payment per month) and type (one of credit_card, student_loan, auto_loan, personal_loan; any other kind is personal_loan). Example: [{"balance": 5000, "rate": 0.18, "minimum": 150, "type": "credit_card"}].
        monthly_payment_budget: Money per month for all debts together, minimums included.
        strategy: Which debt comes first. avalanche: the highest rate. snowball: the smallest balance. hybrid: a blend of both. If not stated: avalanche.
        extra_payment_allocation: Where money above the minimums goes. single_focus: all to the first debt. proportional: spread over all debts by balance. high_interest_only: only to debts at or above interest_rate_threshold. If not stated: single_focus.
        interest_rate_threshold: Rate per year from which a debt counts as high-interest, as a ratio, 0 to 0.40 (12% is 0.12). If not stated: 0.1.
        consolidation_available: True if a consolidation loan or balance transfer is on offer. If not stated: false.
        consolidation_rate: Rate per year of that offer as a ratio, 0 to 0.40 (8% is 0.08); null if there is no offer. If not stated: null.
        balance_transfer_fee: One-off fee of the offer as a ratio of the debt moved, 0 to 0.10 (3% is 0.03). If not stated: 0.
        credit_score_impact_weight: For hybrid, 0 to 1: 0 looks at rates alone, 1 at small balances alone, which helps the credit score sooner. If not stated: 0.5.

    Returns:
        One line: months, total interest, first target, verdict on consolidation.
    """
    error = first_error(
        _debts_problem(debts),
        positive("monthly_payment_budget", monthly_payment_budget),
        choice("strategy", strategy, STRATEGIES),
        choice("extra_payment_allocation", extra_payment_allocation, ALLOCATIONS),
        number("interest_rate_threshold", interest_rate_threshold, 0, 0.40),
        flag("consolidation_available", consolidation_available),
        number("consolidation_rate", consolidation_rate, 0, 0.40, null_ok=not consolidation_available),
        number("balance_transfer_fee", balance_transfer_fee, 0, 0.10),
        number("credit_score_impact_weight", credit_score_impact_weight, 0, 1),
    )
    if error:
        return error
    minimums = sum(debt["minimum"] for debt in debts)
    if monthly_payment_budget < minimums:
        return f"Error: monthly_payment_budget must cover the minimums of {usd(minimums)}, got {monthly_payment_budget}"

    plan = Plan(
        monthly_payment_budget,
        strategy,
        extra_payment_allocation,
        interest_rate_threshold,
        credit_score_impact_weight,
    )
    payoff = _simulate(debts, plan)
    if payoff is None:
        return f"Error: the debts are not paid off within {MOST_MONTHS} months; payments must be higher"
    verdict = "not offered"
    if consolidation_available:
        verdict = _verdict(debts, plan, payoff, consolidation_rate, balance_transfer_fee)
    first = _ordered(debts, plan)[0]
    return (
        f"Payoff Time: {payoff.months} months, Total Interest: {usd(payoff.interest)}, "
        f"First Target: {first['type']} at {percent(first['rate'], 2)}, Consolidation: {verdict}"
    )


def _debts_problem(debts: Any) -> str | None:
    if not isinstance(debts, list) or not 1 <= len(debts) <= MOST_DEBTS:
        return f"debts must be a list of 1 to {MOST_DEBTS} objects, got {short(debts)}"
    for i, debt in enumerate(debts):
        keys = {"balance", "rate", "minimum", "type"}
        if not isinstance(debt, dict) or set(debt) != keys:
            return f"debts[{i}] must have the keys balance, rate, minimum and type, got {short(debt)}"
        problem = (
            positive(f"debts[{i}].balance", debt["balance"])
            or number(f"debts[{i}].rate", debt["rate"], 0, 0.40)
            or number(f"debts[{i}].minimum", debt["minimum"], 0, LARGEST_AMOUNT)
            or choice(f"debts[{i}].type", debt["type"], DEBT_TYPES)
        )
        if problem:
            return problem
    return None


def _ordered(debts: list[dict], plan: Plan) -> list[dict]:
    """The debts, the one to attack first at the front; equals keep their order."""
    if plan.strategy == "avalanche":
        return sorted(debts, key=lambda debt: -debt["rate"])
    if plan.strategy == "snowball":
        return sorted(debts, key=lambda debt: debt["balance"])
    highest = max(debt["rate"] for debt in debts) or 1.0
    largest = max(debt["balance"] for debt in debts)
    weight = plan.score_weight

    def urgency(debt: dict) -> float:
        return (1 - weight) * debt["rate"] / highest + weight * (1 - debt["balance"] / largest)

    return sorted(debts, key=lambda debt: -urgency(debt))


def _simulate(debts: list[dict], plan: Plan) -> Payoff | None:
    """Each month: interest accrues, minimums are paid, what is left of the budget goes by the plan."""
    owed = [dict(debt) for debt in _ordered(debts, plan)]
    interest = 0.0
    for month in range(1, MOST_MONTHS + 1):
        left = plan.budget
        for debt in owed:
            accrued = debt["balance"] * debt["rate"] / 12
            interest += accrued
            payment = min(debt["minimum"], debt["balance"] + accrued)
            debt["balance"] += accrued - payment
            left -= payment
        _pay_extra(owed, left, plan)
        owed = [debt for debt in owed if debt["balance"] > PAID]
        if not owed:
            return Payoff(month, interest)
    return None


def _pay_extra(owed: list[dict], left: float, plan: Plan) -> None:
    """Take `left` dollars off the balances, in place."""
    if plan.allocation == "proportional":
        total = sum(debt["balance"] for debt in owed)
        share = min(1.0, left / total) if total else 0.0
        for debt in owed:
            debt["balance"] -= share * debt["balance"]
        return
    for debt in owed:
        if plan.allocation == "high_interest_only" and debt["rate"] < plan.threshold:
            continue
        payment = min(left, debt["balance"])
        debt["balance"] -= payment
        left -= payment


def _verdict(debts: list[dict], plan: Plan, payoff: Payoff, rate: float, fee_ratio: float) -> str:
    """Compare with one loan in place of all debts that cost more than it does."""
    moved = [debt for debt in debts if debt["rate"] > rate]
    if not moved:
        return "no, it lowers no rate"
    fee = fee_ratio * sum(debt["balance"] for debt in moved)
    loan = {
        "balance": sum(debt["balance"] for debt in moved) + fee,
        "rate": rate,
        "minimum": sum(debt["minimum"] for debt in moved),
        "type": "personal_loan",
    }
    kept = [debt for debt in debts if debt["rate"] <= rate]
    consolidated = _simulate([*kept, loan], plan)
    if consolidated is None:
        return "no, it is not paid off in time"
    saving = payoff.interest - consolidated.interest - fee
    return f"yes, saves {usd(saving)}" if saving > 0 else f"no, costs {usd(-saving)} more"
