"""Insurance needs: life cover by the capital-needs method, disability and long-term care."""

from typing import Literal

from tools_funcs.financial.common import (
    LARGEST_AMOUNT,
    amount,
    annuity_present_value,
    choice,
    first_error,
    positive,
    table,
    usd,
    whole,
)

REAL_DISCOUNT_RATE = 0.02
COVERAGES = ("life", "disability", "ltc")
# Yearly premium in dollars per 1,000 of term life cover, up to and including the age.
LIFE_PREMIUM = {29: 0.6, 39: 0.8, 49: 1.9, 59: 5.0, 80: 12.5}
HEALTH_FACTOR = {"excellent": 0.8, "good": 1.0, "fair": 1.4, "poor": 2.2}
OCCUPATION_FACTOR = {"low": 0.8, "medium": 1.0, "high": 1.5}
DISABILITY_SHARE = 0.60
DISABILITY_PREMIUM = 0.02  # of the monthly benefit, each month
CARE_FROM_AGE = 50
CARE_COST = 6_000  # dollars a month
CARE_PREMIUM = 0.03  # of the monthly benefit, each month


def calculate_insurance_needs(
    age: int,
    annual_income: float,
    dependents: int,
    mortgage_balance: float,
    other_debts: float,
    existing_coverage: dict[str, float],
    health_status: Literal["excellent", "good", "fair", "poor"],
    occupation_risk: Literal["low", "medium", "high"],
    years_until_retirement: int,
    spouse_income: float | None,
    college_funding_need: float,
    final_expenses: float,
) -> str:
    """Compute how much life, disability and long-term care insurance is still missing, with monthly premiums. For questions such as "how much life insurance do I need". Amounts in US dollars.

    Args:
        age: Age of the insured in years, 18 to 80.
        annual_income: Gross income per year of the insured. Write "95k" as 95000.
        dependents: Children or others who live on this income, 0 to 10, without the spouse. If not stated: 0.
        mortgage_balance: What is still owed on the home. If not stated: 0.
        other_debts: All other debts together (car, student loans, cards). If not stated: 0.
        existing_coverage: Insurance already held, with the keys life (death benefit), disability (benefit per month) and ltc (long-term care benefit per month). Leave out what is not held. Example: {"life": 250000, "disability": 2000}. If not stated: {}.
        health_status: excellent: no issues, non-smoker. good: minor issues. fair: a chronic condition. poor: serious illness. If not stated: good.
        occupation_risk: low: desk or office work. medium: some physical work. high: manual or dangerous work. If not stated: low.
        years_until_retirement: Whole years of work left, 1 to 50.
        spouse_income: Gross income per year of the spouse or partner; 0 for one without income, null without spouse. If not stated: null.
        college_funding_need: College money wanted for all children together, in today's dollars. If not stated: 0.
        final_expenses: Funeral and estate costs. If not stated: 15000.

    Returns:
        One line: missing cover and premium per kind, total premium per month.
    """
    error = first_error(
        whole("age", age, 18, 80),
        positive("annual_income", annual_income),
        whole("dependents", dependents, 0, 10),
        amount("mortgage_balance", mortgage_balance),
        amount("other_debts", other_debts),
        table("existing_coverage", existing_coverage, dict.fromkeys(COVERAGES, LARGEST_AMOUNT)),
        choice("health_status", health_status, HEALTH_FACTOR),
        choice("occupation_risk", occupation_risk, OCCUPATION_FACTOR),
        whole("years_until_retirement", years_until_retirement, 1, 50),
        amount("spouse_income", spouse_income, null_ok=True),
        amount("college_funding_need", college_funding_need),
        amount("final_expenses", final_expenses),
    )
    if error:
        return error

    lacking = _income_lacking(annual_income, dependents, spouse_income)
    capital = lacking * annuity_present_value(REAL_DISCOUNT_RATE, years_until_retirement)
    capital += mortgage_balance + other_debts + college_funding_need + final_expenses
    life = max(0.0, capital - existing_coverage.get("life", 0))
    disability = max(0.0, DISABILITY_SHARE * annual_income / 12 - existing_coverage.get("disability", 0))
    care = max(0.0, CARE_COST - existing_coverage.get("ltc", 0)) if age >= CARE_FROM_AGE else 0.0

    per_thousand = next(premium for oldest, premium in LIFE_PREMIUM.items() if age <= oldest)
    life_premium = life / 1_000 * per_thousand / 12 * HEALTH_FACTOR[health_status]
    disability_premium = disability * DISABILITY_PREMIUM * OCCUPATION_FACTOR[occupation_risk]
    care_premium = care * CARE_PREMIUM * HEALTH_FACTOR[health_status]
    return (
        f"Life: {usd(life)} ({usd(life_premium)}/mo), "
        f"Disability: {usd(disability)}/mo ({usd(disability_premium)}/mo), "
        f"Long-Term Care: {usd(care)}/mo ({usd(care_premium)}/mo), "
        f"Total Premium: {usd(life_premium + disability_premium + care_premium)}/mo"
    )


def _income_lacking(income: float, dependents: int, spouse_income: float | None) -> float:
    """Dollars a year that the survivors would lack.

    They need 60 % of the household's income, 5 points more for each dependent, at most 80 %.
    Without spouse and dependents there is no one to provide for.
    """
    if spouse_income is None and dependents == 0:
        return 0.0
    spouse = spouse_income or 0
    share = min(0.80, 0.60 + 0.05 * dependents)
    return max(0.0, share * (income + spouse) - spouse)
