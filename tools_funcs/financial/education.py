"""Education funding: inflated college costs against projected savings."""

from typing import Literal

from tools_funcs.financial.common import (
    amount,
    annuity_future_value,
    choice,
    first_error,
    number,
    usd,
    whole,
)
from tools_funcs.financial.states import INCOME_TAX, STATES

# Tuition, fees, housing and food of the school year 2024-25, rounded to 1,000 dollars.
AVERAGE_COST = {"public_instate": 25_000, "public_outstate": 44_000, "private": 59_000, "community": 15_000}
COMMUNITY_YEARS = 3
# These tax income but give no deduction for contributions to a 529 plan.
NO_529_DEDUCTION = ("CA", "HI", "KY", "NC")


def calculate_education_funding(
    child_current_age: int,
    college_start_age: int,
    years_of_college: int,
    current_annual_cost: float | None,
    education_inflation_rate: float,
    current_savings: float,
    monthly_contribution: float,
    expected_return: float,
    financial_aid_expected: float,
    student_contribution_percent: float,
    state_residency: str,
    school_type: Literal["public_instate", "public_outstate", "private", "community"],
) -> str:
    """Compare the inflated cost of a child's college with the projected savings and compute the monthly saving that closes the gap. For questions about college funds and 529 plans. Amounts in US dollars.

    Args:
        child_current_age: The child's age now in whole years, 0 to 17; 0 for a newborn.
        college_start_age: Age at which college starts, above child_current_age and at most 30. If not stated: 18.
        years_of_college: College years, 1 to 6; at most 3 for community. If not stated: 4.
        current_annual_cost: What one year at the school costs today; null takes the average for school_type. If not stated: null.
        education_inflation_rate: Rise of college costs per year as a ratio, 0 to 0.12 (5% is 0.05). If not stated: 0.05.
        current_savings: Already saved for this child. If not stated: 0.
        monthly_contribution: Saved per month; divide a yearly amount by 12. If not stated: 0.
        expected_return: Return of the savings per year as a ratio, 0 to 0.15 (6% is 0.06). If not stated: 0.06.
        financial_aid_expected: Scholarships and grants per college year in today's dollars; they rise with the costs. If not stated: 0.
        student_contribution_percent: Share of the cost after aid that the student pays as a ratio, 0 to 1 (20% is 0.2). If not stated: 0.
        state_residency: Two-letter code of the US state where the family lives, such as "OH" for Ohio.
        school_type: public_instate: public university of the own state. public_outstate: of another state. private: private college. community: two-year community college.

    Returns:
        One line: total cost, needed fund, projected savings, gap, extra saving per month, state tax saving.
    """
    error = first_error(
        whole("child_current_age", child_current_age, 0, 17),
        whole("college_start_age", college_start_age, 1, 30),
        whole("years_of_college", years_of_college, 1, COMMUNITY_YEARS if school_type == "community" else 6),
        amount("current_annual_cost", current_annual_cost, null_ok=True),
        number("education_inflation_rate", education_inflation_rate, 0, 0.12),
        amount("current_savings", current_savings),
        amount("monthly_contribution", monthly_contribution),
        number("expected_return", expected_return, 0, 0.15),
        amount("financial_aid_expected", financial_aid_expected),
        number("student_contribution_percent", student_contribution_percent, 0, 1),
        choice("state_residency", state_residency, STATES),
        choice("school_type", school_type, AVERAGE_COST),
    )
    if error:
        return error
    years = college_start_age - child_current_age
    if years <= 0:
        return f"Error: college_start_age must be above child_current_age, got {college_start_age} and {child_current_age}"

    cost = AVERAGE_COST[school_type] if current_annual_cost is None else current_annual_cost
    net_today = max(0.0, cost - financial_aid_expected) * (1 - student_contribution_percent)
    bills = [net_today * (1 + education_inflation_rate) ** (years + k) for k in range(int(years_of_college))]
    # Each year is paid at its start; what is not yet due still earns the return.
    needed = sum(bill / (1 + expected_return) ** k for k, bill in enumerate(bills))

    monthly_return = (1 + expected_return) ** (1 / 12) - 1
    growth = annuity_future_value(monthly_return, 12 * years)
    projected = current_savings * (1 + expected_return) ** years + monthly_contribution * growth
    gap = needed - projected
    deductible = state_residency not in NO_529_DEDUCTION
    tax_saving = 12 * monthly_contribution * INCOME_TAX[state_residency] if deductible else 0.0
    return (
        f"Total Cost: {usd(sum(bills))}, Needed at Start: {usd(needed)}, Projected Savings: {usd(projected)}, "
        f"{'Gap' if gap > 0 else 'Surplus'}: {usd(abs(gap))}, "
        f"Extra Monthly Saving: {usd(max(0.0, gap) / growth)}, State Tax Saving: {usd(tax_saving)}/yr"
    )
