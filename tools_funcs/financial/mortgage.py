"""Mortgage affordability: the highest price within the debt-to-income limits."""

from typing import Literal, NamedTuple

from tools_funcs.financial.common import (
    amount,
    annuity_present_value,
    choice,
    first_error,
    flag,
    number,
    percent,
    positive,
    usd,
    whole,
)
from tools_funcs.financial.states import PROPERTY_TAX, STATES


class LoanProgram(NamedTuple):
    """Rules of one loan type; all but `credit_score` are ratios."""

    min_down: float
    front_dti: float  # housing cost / gross income
    back_dti: float  # (housing cost + debts) / gross income
    insurance: float  # yearly mortgage insurance / loan
    rate_change: float
    credit_score: int


LOAN_PROGRAMS = {
    "conventional": LoanProgram(0.03, 0.28, 0.43, 0.006, 0.0, 620),
    "fha": LoanProgram(0.035, 0.31, 0.43, 0.0055, -0.0025, 580),
    "va": LoanProgram(0.0, 0.41, 0.41, 0.0, -0.005, 580),
    "jumbo": LoanProgram(0.10, 0.28, 0.38, 0.007, 0.0025, 700),
}
# Lowest FICO score of the tier: yearly rate of a 30-year conventional loan.
RATE_BY_SCORE = {760: 0.065, 720: 0.0675, 680: 0.07, 640: 0.0775, 300: 0.085}
TERM_CHANGE = {15: -0.0075, 20: -0.0025, 30: 0.0}
INSURANCE_FREE_LTV = 0.80


def calculate_mortgage_affordability(
    annual_income: float,
    monthly_debts: float,
    down_payment: float,
    credit_score: int,
    loan_type: Literal["conventional", "fha", "va", "jumbo"],
    property_state: str,
    property_tax_rate: float | None,
    hoa_fees: float,
    homeowners_insurance: float,
    pmi_required: bool,
    interest_rate_override: float | None,
    loan_term_years: Literal[15, 20, 30],
) -> str:
    """Find the highest home price within the lender's debt-to-income limits, with the monthly payment and its parts. For questions such as "how much house can I afford". Amounts in US dollars.

    Args:
        annual_income: Gross household income per year, before taxes. Write "120k" as 120000; multiply a monthly income by 12.
        monthly_debts: Payments per month on other debts (car, student loans, cards), without rent. If not stated: 0.
        down_payment: Cash put down for the home.
        credit_score: FICO score of the buyer, 300 to 850.
        loan_type: conventional: the usual loan. fha: low down payment. va: for veterans and service members. jumbo: above the conforming limit. If not stated: conventional.
        property_state: Two-letter code of the US state where the home is, such as "CA" for California.
        property_tax_rate: Property tax per year as a ratio of the price, 0 to 0.05 (1.2% is 0.012); null takes the state's average. If not stated: null.
        hoa_fees: Homeowners association or condo fee per month. If not stated: 0.
        homeowners_insurance: Home insurance per month; divide a yearly premium by 12. If not stated: 150.
        pmi_required: True if mortgage insurance (PMI) is due while the loan exceeds 80% of the price; false if waived. If not stated: true.
        interest_rate_override: Quoted mortgage rate per year as a ratio, 0.01 to 0.15 (6.5% is 0.065); null takes the rate for the score, loan type and term. If not stated: null.
        loan_term_years: Length of the loan in years. If not stated: 30.

    Returns:
        One line: highest price, loan, monthly payment, debt-to-income ratio, rate.
    """
    error = first_error(
        positive("annual_income", annual_income),
        amount("monthly_debts", monthly_debts),
        amount("down_payment", down_payment),
        whole("credit_score", credit_score, 300, 850),
        choice("loan_type", loan_type, LOAN_PROGRAMS),
        choice("property_state", property_state, STATES),
        number("property_tax_rate", property_tax_rate, 0, 0.05, null_ok=True),
        amount("hoa_fees", hoa_fees),
        amount("homeowners_insurance", homeowners_insurance),
        flag("pmi_required", pmi_required),
        number("interest_rate_override", interest_rate_override, 0.01, 0.15, null_ok=True),
        choice("loan_term_years", loan_term_years, TERM_CHANGE),
    )
    if error:
        return error
    program = LOAN_PROGRAMS[loan_type]
    if credit_score < program.credit_score:
        return f"Error: credit_score must be at least {program.credit_score} for loan_type {loan_type}, got {credit_score}"

    rate = interest_rate_override
    if rate is None:
        rate = _market_rate(credit_score, program, loan_term_years)
    tax_rate = PROPERTY_TAX[property_state] if property_tax_rate is None else property_tax_rate
    income = annual_income / 12
    housing = min(program.front_dti * income, program.back_dti * income - monthly_debts)
    budget = housing - hoa_fees - homeowners_insurance
    if budget <= down_payment * tax_rate / 12:
        return "Error: nothing is left to repay a loan; debts, fees and insurance must be lower or the income higher"
    if down_payment == 0 and program.min_down > 0:
        return f"Error: down_payment must be at least {percent(program.min_down)} of the price for loan_type {loan_type}, got 0"

    repayment = 1 / annuity_present_value(rate / 12, loan_term_years * 12)
    insurance = program.insurance / 12 if pmi_required else 0.0
    price = _highest_price(budget, down_payment, repayment, tax_rate / 12, insurance)
    if program.min_down:
        price = min(price, down_payment / program.min_down)

    loan = price - down_payment
    # A price of exactly five times the down payment needs no insurance, also after rounding.
    insured = loan > INSURANCE_FREE_LTV * price * (1 + 1e-9)
    parts = {
        "P&I": loan * repayment,
        "Tax": price * tax_rate / 12,
        "Insurance": homeowners_insurance,
        "HOA": hoa_fees,
        "PMI": loan * insurance if insured else 0.0,
    }
    total = sum(parts.values())
    breakdown = ", ".join(f"{part} {usd(value)}" for part, value in parts.items())
    return (
        f"Max Price: {usd(price)}, Loan: {usd(loan)}, Monthly Payment: {usd(total)} ({breakdown}), "
        f"DTI: {percent((total + monthly_debts) / income)}, Rate: {percent(rate, 3)}"
    )


def _market_rate(credit_score: int, program: LoanProgram, term: int) -> float:
    tier = next(rate for lowest, rate in RATE_BY_SCORE.items() if credit_score >= lowest)
    return tier + program.rate_change + TERM_CHANGE[term]


def _highest_price(budget: float, down: float, repayment: float, tax: float, insurance: float) -> float:
    """Solve budget = (price − down)·(repayment + insurance) + price·tax, insurance only over 80 % loan to value.

    All rates are per month and per dollar of loan (`repayment`, `insurance`) or price (`tax`).
    """
    uninsured = (budget + down * repayment) / (repayment + tax)
    threshold = down / (1 - INSURANCE_FREE_LTV)
    if uninsured <= threshold:
        return uninsured
    insured = (budget + down * (repayment + insurance)) / (repayment + insurance + tax)
    return max(insured, threshold)
