"""Retirement readiness: projected savings against the capital that the plan needs."""

from tools_funcs.financial.common import (
    amount,
    annuity_future_value,
    annuity_present_value,
    first_error,
    number,
    positive,
    usd,
    whole,
)

# Yearly medical cost of a retired person in dollars, when the caller gives none.
TYPICAL_HEALTHCARE = 6_500
# Lowest readiness in percent: what it is called.
STATUS = {100: "On Track", 80: "Nearly There", 60: "Needs Improvement", 0: "Behind"}


def calculate_retirement_readiness(
    current_age: int,
    retirement_age: int,
    current_savings: float,
    annual_contribution: float,
    employer_match_percent: float,
    expected_return: float,
    inflation_rate: float,
    desired_retirement_income: float,
    social_security_estimate: float,
    pension_income: float,
    healthcare_cost_annual: float | None,
    life_expectancy: int,
) -> str:
    """Tell whether someone saves enough to retire: projected savings against the capital that pays the wished income for life, and how much more to save. For questions such as "can I retire at 62". Amounts in US dollars.

    Args:
        current_age: Age now in years, 18 to 80.
        retirement_age: Age at which work ends, above current_age and at most 85. If not stated: 67.
        current_savings: All retirement savings today (401k, IRA and so on). Write "$1.2M" as 1200000.
        annual_contribution: Own contributions per year, without the employer's; multiply a monthly amount by 12.
        employer_match_percent: What the employer adds per dollar contributed, as a ratio, 0 to 2 (50% is 0.5, dollar for dollar is 1). If not stated: 0.
        expected_return: Return of the investments per year as a ratio, 0 to 0.15 (7% is 0.07). If not stated: 0.06.
        inflation_rate: Inflation per year as a ratio, 0 to 0.10 (3% is 0.03). If not stated: 0.025.
        desired_retirement_income: Income wanted per year of retirement in today's dollars; multiply a monthly amount by 12.
        social_security_estimate: Social Security benefit per year in today's dollars; multiply a monthly benefit by 12. If not stated: 0.
        pension_income: Pension per year in today's dollars. If not stated: 0.
        healthcare_cost_annual: Medical costs per year of retirement in today's dollars, on top of the income; null takes a typical cost. If not stated: null.
        life_expectancy: Age up to which the money must last, above retirement_age and at most 115. If not stated: 90.

    Returns:
        One line: projected and needed savings, readiness, extra saving per year, status.
    """
    error = first_error(
        whole("current_age", current_age, 18, 80),
        whole("retirement_age", retirement_age, 19, 85),
        amount("current_savings", current_savings),
        amount("annual_contribution", annual_contribution),
        number("employer_match_percent", employer_match_percent, 0, 2),
        number("expected_return", expected_return, 0, 0.15),
        number("inflation_rate", inflation_rate, 0, 0.10),
        positive("desired_retirement_income", desired_retirement_income),
        amount("social_security_estimate", social_security_estimate),
        amount("pension_income", pension_income),
        amount("healthcare_cost_annual", healthcare_cost_annual, null_ok=True),
        whole("life_expectancy", life_expectancy, 20, 115),
    )
    if error:
        return error
    if not current_age < retirement_age < life_expectancy:
        return (
            "Error: ages must rise from current_age over retirement_age to life_expectancy, "
            f"got {current_age}, {retirement_age}, {life_expectancy}"
        )

    years = retirement_age - current_age
    growth = annuity_future_value(expected_return, years)
    saved_yearly = annual_contribution * (1 + employer_match_percent)
    projected = current_savings * (1 + expected_return) ** years + saved_yearly * growth
    deflator = (1 + inflation_rate) ** years

    healthcare = TYPICAL_HEALTHCARE if healthcare_cost_annual is None else healthcare_cost_annual
    gap = desired_retirement_income + healthcare - social_security_estimate - pension_income
    needed = max(0.0, gap) * _years_paid(expected_return, inflation_rate, life_expectancy - retirement_age)

    today = projected / deflator
    readiness = today / needed * 100 if needed else 100.0
    extra = max(0.0, needed - today) * deflator / growth
    status = next(name for lowest, name in STATUS.items() if readiness >= lowest)
    return (
        f"Projected Savings: {usd(projected)} ({usd(today)} in today's dollars), Needed: {usd(needed)}, "
        f"Readiness: {readiness:.0f}%, Extra Saving Needed: {usd(extra)}/yr, Status: {status}"
    )


def _years_paid(nominal: float, inflation: float, years: int) -> float:
    """Capital per dollar of income: an annuity paid at each year's start, at the real return."""
    real = (1 + nominal) / (1 + inflation) - 1
    return annuity_present_value(real, years) * (1 + real)
