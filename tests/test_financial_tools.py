"""The financial tools: figures worked by hand, refusals, and what every tool must hold."""

import inspect
import math
from pathlib import Path

import pytest

from tools_funcs.financial.common import percent, usd
from tools_funcs.financial.states import STATES
from tools_funcs.financial_tools_complex import (
    TOOL_FUNCTIONS,
    analyze_debt_payoff_strategy,
    calculate_currency_exchange_arbitrage,
    calculate_education_funding,
    calculate_insurance_needs,
    calculate_mortgage_affordability,
    calculate_portfolio_allocation,
    calculate_retirement_readiness,
    optimize_tax_strategy,
)

PORTFOLIO = dict(
    total_investment=100_000,
    risk_tolerance="moderate",
    time_horizon_years=20,
    current_age=40,
    retirement_age=65,
    income_need_percentage=0.04,
    existing_allocations={"equity_us_large": 0.5, "cash": 0.1},
    esg_preference=False,
    tax_loss_harvesting=False,
    rebalancing_frequency="annual",
    inflation_protection=False,
    liquidity_requirement="long_term",
)
MORTGAGE = dict(
    annual_income=120_000,
    monthly_debts=500,
    down_payment=100_000,
    credit_score=740,
    loan_type="conventional",
    property_state="TX",
    property_tax_rate=0.012,
    hoa_fees=0,
    homeowners_insurance=150,
    pmi_required=True,
    interest_rate_override=0.06,
    loan_term_years=30,
)
TAX = dict(
    gross_income=100_000,
    filing_status="single",
    state="TX",
    retirement_contributions={},
    capital_gains_short=0,
    capital_gains_long=0,
    dividend_income_qualified=0,
    dividend_income_ordinary=0,
    itemized_deductions=0,
    dependents=0,
    self_employment_income=0,
    rental_income=0,
)
RETIREMENT = dict(
    current_age=60,
    retirement_age=62,
    current_savings=100_000,
    annual_contribution=10_000,
    employer_match_percent=1,
    expected_return=0.05,
    inflation_rate=0,
    desired_retirement_income=80_000,
    social_security_estimate=0,
    pension_income=0,
    healthcare_cost_annual=0,
    life_expectancy=64,
)
DEBT = dict(
    debts=[
        {"balance": 600, "rate": 0, "minimum": 50, "type": "student_loan"},
        {"balance": 1200, "rate": 0.12, "minimum": 100, "type": "credit_card"},
    ],
    monthly_payment_budget=250,
    strategy="avalanche",
    extra_payment_allocation="single_focus",
    interest_rate_threshold=0.1,
    consolidation_available=False,
    consolidation_rate=None,
    balance_transfer_fee=0,
    credit_score_impact_weight=0.5,
)
INSURANCE = dict(
    age=30,
    annual_income=60_000,
    dependents=0,
    mortgage_balance=200_000,
    other_debts=10_000,
    existing_coverage={},
    health_status="good",
    occupation_risk="low",
    years_until_retirement=35,
    spouse_income=None,
    college_funding_need=0,
    final_expenses=15_000,
)
EDUCATION = dict(
    child_current_age=16,
    college_start_age=18,
    years_of_college=2,
    current_annual_cost=10_000,
    education_inflation_rate=0,
    current_savings=5_000,
    monthly_contribution=0,
    expected_return=0,
    financial_aid_expected=0,
    student_contribution_percent=0,
    state_residency="OH",
    school_type="private",
)
CURRENCY = dict(
    base_currency="USD",
    target_currency="EUR",
    amount=10_000,
    exchange_method="bank",
    transfer_fee_percent=0.01,
    transfer_fee_fixed=100,
    intermediate_currency=None,
    spot_rate_override=None,
    forward_contract_months=0,
    hedging_strategy="none",
    tax_reporting_required=False,
)
BASE = dict(
    zip(
        TOOL_FUNCTIONS,
        [PORTFOLIO, MORTGAGE, TAX, RETIREMENT, DEBT, INSURANCE, EDUCATION, CURRENCY],
        strict=True,
    )
)


def test_portfolio_by_hand():
    # Bonds 1 − .60 − .05 − (.02 + .04) = .29. Return .6·.085 + .29·.045 + .05·.065 + .06·.03 − .0002.
    # Variance .009216 + .00030276 + .000049 + .00000036 + .00033408 + .0008064 + .00004872.
    # Present: equity .5, cash .1 + .4 unallocated; ½(.1 + .29 + .05 + .44) = .44 is traded.
    assert calculate_portfolio_allocation(**PORTFOLIO) == (
        "Allocation: equity 60.0%, bonds 29.0%, real assets 5.0%, cash 6.0%, Expected Return: 6.89%, "
        "Risk: 10.37%, Amount to Trade: $44,000"
    )


def test_portfolio_options_by_hand():
    # Six years left: equity .75 − .02·4 = .67; real assets .10; cash .15; bonds .08.
    # Return .05695 + .0036 + .0065 + .0045 − .002·.67 − .0025·.08 + .003·.67 − .0012 = .07082.
    changes = dict(
        risk_tolerance="moderate_aggressive",
        time_horizon_years=30,
        retirement_age=46,
        income_need_percentage=0,
        esg_preference=True,
        tax_loss_harvesting=True,
        rebalancing_frequency="monthly",
        inflation_protection=True,
        liquidity_requirement="immediate",
    )
    line = calculate_portfolio_allocation(**PORTFOLIO | changes)
    assert line.startswith(
        "Allocation: equity 67.0%, bonds 8.0%, real assets 10.0%, cash 15.0%, Expected Return: 7.08%"
    )


def test_mortgage_by_hand():
    # 28 % of 10,000 is 2,800 (43 % less 500 is more); 2,650 after insurance. A 30-year loan at 6 %
    # costs 599.5505 a month per 100,000, so the price is (2,650 + 599.5505) / .006995505 = 464,519.8.
    assert calculate_mortgage_affordability(**MORTGAGE) == (
        "Max Price: $464,520, Loan: $364,520, Monthly Payment: $2,800 "
        "(P&I $2,185, Tax $465, Insurance $150, HOA $0, PMI $0), DTI: 33.0%, Rate: 6.000%"
    )


def test_mortgage_insurance_enters_the_price():
    # (2,650 + 50,000·.006495505) / .007495505 = 396,874.6; insurance .006/12 of the loan.
    line = calculate_mortgage_affordability(**MORTGAGE | {"down_payment": 50_000})
    assert line.startswith("Max Price: $396,875, Loan: $346,875, Monthly Payment: $2,800")
    assert "PMI $173" in line


def test_mortgage_stops_at_eighty_percent_where_insurance_would_cost_more():
    # Without insurance 455,943 would do, with it less than 5 · 90,000: 450,000 needs none.
    line = calculate_mortgage_affordability(**MORTGAGE | {"down_payment": 90_000})
    assert line.startswith("Max Price: $450,000, Loan: $360,000") and "PMI $0" in line


def test_mortgage_minimum_down_payment_and_back_ratio():
    line = calculate_mortgage_affordability(**MORTGAGE | {"down_payment": 3_000})
    assert line.startswith("Max Price: $100,000, Loan: $97,000")
    # 41 % of 10,000 less 3,000 of debts leaves 1,100.
    line = calculate_mortgage_affordability(**MORTGAGE | {"loan_type": "va", "monthly_debts": 3_000})
    assert "Monthly Payment: $1,100" in line and "DTI: 41.0%" in line


def test_mortgage_rate_by_score_type_and_term():
    changes = {"interest_rate_override": None, "loan_type": "fha", "loan_term_years": 15}
    assert calculate_mortgage_affordability(**MORTGAGE | changes).endswith("Rate: 5.750%")  # 6.75 − .25 − .75


def test_tax_wages_by_hand():
    # 85,400 taxable: .10·11,600 + .12·35,550 + .22·38,250 = 13,841.
    assert optimize_tax_strategy(**TAX) == (
        "Total Tax: $13,841 (Federal $13,841, Self-Employment $0, State $0), Effective Rate: 13.8%, "
        "Marginal Rate: 22%, Deduction: standard, Idea: add $23,000 to a traditional 401(k) and save $5,060"
    )


def test_tax_gains_children_and_state_by_hand():
    # Ordinary 60,800: 2,320 + .12·37,600 = 6,832; the gains end at 80,800, below 94,050: 0 %.
    # Two children: −4,000. Pennsylvania .0307·80,800 = 2,480.56. A full 401(k) leaves no idea.
    changes = dict(
        gross_income=113_000,
        filing_status="married",
        state="PA",
        retirement_contributions={"traditional_401k": 23_000},
        capital_gains_long=20_000,
        dependents=2,
    )
    assert optimize_tax_strategy(**TAX | changes) == (
        "Total Tax: $5,313 (Federal $2,832, Self-Employment $0, State $2,481), Effective Rate: 4.0%, "
        "Marginal Rate: 12%, Deduction: standard, Idea: none"
    )


def test_tax_self_employment_by_hand():
    # Base 46,175, tax .153·46,175 = 7,064.78, half of it deductible: taxable 31,867.61,
    # 1,160 + .12·20,267.61 = 3,592.11.
    line = optimize_tax_strategy(**TAX | {"gross_income": 0, "self_employment_income": 50_000})
    assert line.startswith("Total Tax: $10,657 (Federal $3,592, Self-Employment $7,065, State $0)")


def test_tax_wage_base_and_child_credit_phase_out():
    # Wages above 168,600 leave 2.9 % on 92,350. 209,500 + 100,000 − 1,339.08 is 108,161 over
    # 200,000: 109 steps of 50 take 5,450 of 6,000; head of household with three children.
    changes = {"gross_income": 209_500, "self_employment_income": 100_000, "filing_status": "head"}
    without = optimize_tax_strategy(**TAX | changes)
    with_children = optimize_tax_strategy(**TAX | changes | {"dependents": 3})
    assert "Self-Employment $2,678," in without
    assert _dollars(without, "Federal") - _dollars(with_children, "Federal") == 550


def test_retirement_by_hand():
    # 100,000·1.1025 + 20,000·2.05 = 151,250; two payments at the start: 80,000·(1 + 1/1.05) = 156,190.48;
    # the lack of 4,940.48 takes 4,940.48/2.05 a year.
    assert calculate_retirement_readiness(**RETIREMENT) == (
        "Projected Savings: $151,250 ($151,250 in today's dollars), Needed: $156,190, Readiness: 97%, "
        "Extra Saving Needed: $2,410/yr, Status: Nearly There"
    )


def test_retirement_counts_inflation_and_other_income():
    # Real return 0 %: 2 · (80,000 + 6,500 − 30,000 − 6,500) = 100,000 needed; 151,250/1.1025 in hand.
    changes = dict(
        inflation_rate=0.05,
        healthcare_cost_annual=None,
        social_security_estimate=30_000,
        pension_income=6_500,
    )
    line = calculate_retirement_readiness(**RETIREMENT | changes)
    assert "($137,188 in today's dollars), Needed: $100,000, Readiness: 137%" in line
    assert line.endswith("$0/yr, Status: On Track")


def test_retirement_without_growth_adds_up():
    line = calculate_retirement_readiness(**RETIREMENT | {"expected_return": 0})
    assert line.startswith("Projected Savings: $140,000") and "Needed: $160,000" in line


def test_debt_avalanche_by_hand():
    # The card falls 1,012.00, 822.12, 630.34, 436.64, 241.01, 43.42, 0; what is left of month 7 goes
    # to the loan, which is gone in month 8. Interest 12 + 10.12 + 8.22 + 6.30 + 4.37 + 2.41 + .43 = 43.86.
    assert analyze_debt_payoff_strategy(**DEBT) == (
        "Payoff Time: 8 months, Total Interest: $44, First Target: credit_card at 12.00%, Consolidation: not offered"
    )


def test_debt_snowball_by_hand():
    # The loan is gone after 4 months. The card pays 12, 11.12, 10.23, 9.33, 8.43, 6.01, 3.57, 1.11.
    assert analyze_debt_payoff_strategy(**DEBT | {"strategy": "snowball"}) == (
        "Payoff Time: 8 months, Total Interest: $62, First Target: student_loan at 0.00%, Consolidation: not offered"
    )


def test_debt_hybrid_lies_between_its_ends():
    hybrid = DEBT | {"strategy": "hybrid"}
    assert analyze_debt_payoff_strategy(**hybrid | {"credit_score_impact_weight": 0}) == (
        analyze_debt_payoff_strategy(**DEBT)
    )
    assert analyze_debt_payoff_strategy(**hybrid | {"credit_score_impact_weight": 1}) == (
        analyze_debt_payoff_strategy(**DEBT | {"strategy": "snowball"})
    )


def test_debt_extra_goes_where_it_is_told():
    debts = [
        {"balance": 300, "rate": 0, "minimum": 0, "type": "auto_loan"},
        {"balance": 100, "rate": 0, "minimum": 0, "type": "credit_card"},
    ]
    plan = DEBT | {"debts": debts, "monthly_payment_budget": 100, "extra_payment_allocation": "proportional"}
    assert analyze_debt_payoff_strategy(**plan).startswith("Payoff Time: 4 months")
    # Nothing extra for debts below the threshold: 600 in minimums of 50.
    only_high = DEBT | {"extra_payment_allocation": "high_interest_only"}
    assert analyze_debt_payoff_strategy(**only_high).startswith("Payoff Time: 12 months, Total Interest: $44")


def test_debt_consolidation_by_hand():
    # 505 a month on 1,000 at 12 %: interest 10 + 5.05 + .05; as 1,010 at 0 %: a fee of 10 and no more.
    debts = [{"balance": 1000, "rate": 0.12, "minimum": 100, "type": "credit_card"}]
    offer = dict(
        debts=debts, monthly_payment_budget=505, consolidation_available=True, balance_transfer_fee=0.01
    )
    line = analyze_debt_payoff_strategy(**DEBT | offer | {"consolidation_rate": 0})
    assert line.startswith("Payoff Time: 3 months, Total Interest: $15")
    assert line.endswith("Consolidation: yes, saves $5")
    line = analyze_debt_payoff_strategy(**DEBT | offer | {"consolidation_rate": 0.12})
    assert line.endswith("Consolidation: no, it lowers no rate")


def test_insurance_without_family_covers_debts_by_hand():
    # 225,000: .8 · 225 / 12 = 15 a month. 60 % of 5,000 = 3,000 a month: · .02 · .8 = 48.
    assert calculate_insurance_needs(**INSURANCE) == (
        "Life: $225,000 ($15/mo), Disability: $3,000/mo ($48/mo), Long-Term Care: $0/mo ($0/mo), "
        "Total Premium: $63/mo"
    )


def test_insurance_of_a_family_by_hand():
    # Two dependents: 70 % of 80,000 less 20,000 = 36,000 a year, two years at 2 %: 69,896.19.
    # + 200,000 + 10,000 + 50,000 + 15,000 − 100,000 held. Age 55, fair health: 5 · 244.9 / 12 · 1.4.
    changes = dict(
        age=55,
        dependents=2,
        spouse_income=20_000,
        years_until_retirement=2,
        college_funding_need=50_000,
        existing_coverage={"life": 100_000, "disability": 1_000, "ltc": 2_000},
        health_status="fair",
        occupation_risk="high",
    )
    assert calculate_insurance_needs(**INSURANCE | changes) == (
        "Life: $244,896 ($143/mo), Disability: $2,000/mo ($60/mo), Long-Term Care: $4,000/mo ($168/mo), "
        "Total Premium: $371/mo"
    )


def test_education_without_growth_by_hand():
    assert calculate_education_funding(**EDUCATION) == (
        "Total Cost: $20,000, Needed at Start: $20,000, Projected Savings: $5,000, Gap: $15,000, "
        "Extra Monthly Saving: $625, State Tax Saving: $0/yr"
    )


def test_education_with_inflation_by_hand():
    # Net (12,000 − 2,000)·.8 = 8,000: bills 8,800 and 9,680; needed 8,800 + 9,680/1.05 = 18,019.05.
    # 10,000·1.05 + 100·12.2726 = 11,727.26; gap 6,291.79 / 12.2726 = 512.67. Ohio: 1,200·.031.
    changes = dict(
        child_current_age=17,
        current_annual_cost=12_000,
        education_inflation_rate=0.10,
        expected_return=0.05,
        current_savings=10_000,
        monthly_contribution=100,
        financial_aid_expected=2_000,
        student_contribution_percent=0.2,
    )
    assert calculate_education_funding(**EDUCATION | changes) == (
        "Total Cost: $18,480, Needed at Start: $18,019, Projected Savings: $11,727, Gap: $6,292, "
        "Extra Monthly Saving: $513, State Tax Saving: $37/yr"
    )


def test_education_average_cost_and_states_without_deduction():
    line = calculate_education_funding(
        **EDUCATION | {"current_annual_cost": None, "school_type": "community"}
    )
    assert line.startswith("Total Cost: $30,000")
    line = calculate_education_funding(**EDUCATION | {"monthly_contribution": 2_000, "state_residency": "CA"})
    assert line.endswith("Surplus: $33,000, Extra Monthly Saving: $0, State Tax Saving: $0/yr")


def test_currency_by_hand():
    # 9,800 · .924 · .98 = 8,874.096; 10,000 − 8,874.096/.924 = 396.
    assert calculate_currency_exchange_arbitrage(**CURRENCY) == (
        "Received: EUR 8,874.10, Effective Rate: 0.8874, Total Cost: USD 396.00, Route: direct, "
        "Tax Report: not due"
    )


def test_currency_takes_the_better_route():
    # Two spreads: .98² · .924 = .88741 beats .98 · .80 = .784, but not .98 · .924.
    free = CURRENCY | {"transfer_fee_percent": 0, "transfer_fee_fixed": 0, "intermediate_currency": "GBP"}
    assert calculate_currency_exchange_arbitrage(**free).startswith("Received: EUR 9,055.20")
    line = calculate_currency_exchange_arbitrage(**free | {"spot_rate_override": 0.80})
    assert line.startswith("Received: EUR 8,874.10") and "Route: via GBP" in line


def test_currency_forward_by_hand():
    # A year ahead: .90552 · (1 + .036)/(1 + .051) · (1 − .002) = .8908124... on 9,800.
    changes = {"hedging_strategy": "forward", "forward_contract_months": 12, "tax_reporting_required": True}
    line = calculate_currency_exchange_arbitrage(**CURRENCY | changes)
    assert line.startswith("Received: EUR 8,729.95") and line.endswith("Tax Report: due")
    # An option over a quarter costs .03 · √¼; parity over a quarter: 1.009/1.01275.
    changes = {"hedging_strategy": "option", "forward_contract_months": 3}
    assert calculate_currency_exchange_arbitrage(**CURRENCY | changes).startswith("Received: EUR 8,708.62")


@pytest.mark.parametrize(
    ("tool", "changes", "message"),
    [
        (calculate_portfolio_allocation, {"total_investment": 0}, "total_investment must be a number from 0.01"),
        (calculate_portfolio_allocation, {"retirement_age": 40}, "retirement_age must be above current_age, got 40"),
        (calculate_portfolio_allocation, {"existing_allocations": {"cash": 0.6, "commodities": 0.5}}, "sum to at most 1"),
        (calculate_portfolio_allocation, {"existing_allocations": {"gold": 0.5}}, "must be one of equity_us_large"),
        (calculate_mortgage_affordability, {"credit_score": 600}, "at least 620 for loan_type conventional, got 600"),
        (calculate_mortgage_affordability, {"monthly_debts": 9_000}, "nothing is left to repay a loan"),
        (calculate_mortgage_affordability, {"down_payment": 0}, "down_payment must be at least 3.0%"),
        (calculate_mortgage_affordability, {"loan_term_years": 25}, "must be one of 15, 20, 30, got 25"),
        (calculate_mortgage_affordability, {"property_state": "California"}, "property_state must be one of AL"),
        (optimize_tax_strategy, {"dependents": 1.5}, "dependents must be a whole number from 0 to 10, got 1.5"),
        (optimize_tax_strategy, {"retirement_contributions": {"hsa": 99_999}}, "from 0 to 9,300, got 99999"),
        (calculate_retirement_readiness, {"life_expectancy": 61}, "ages must rise"),
        (calculate_retirement_readiness, {"expected_return": 7}, "from 0 to 0.15, got 7"),
        (analyze_debt_payoff_strategy, {"debts": []}, "debts must be a list of 1 to 20 objects"),
        (analyze_debt_payoff_strategy, {"debts": [{"balance": 1}]}, "debts[0] must have the keys"),
        (analyze_debt_payoff_strategy, {"monthly_payment_budget": 100}, "must cover the minimums of $150, got 100"),
        (analyze_debt_payoff_strategy, {"consolidation_available": True}, "consolidation_rate must be a number"),
        (calculate_insurance_needs, {"existing_coverage": {"car": 1}}, "must be one of life, disability, ltc"),
        (calculate_education_funding, {"college_start_age": 16}, "college_start_age must be above"),
        (calculate_education_funding, {"school_type": "community", "years_of_college": 4}, "from 1 to 3, got 4"),
        (calculate_currency_exchange_arbitrage, {"target_currency": "USD"}, "must differ"),
        (calculate_currency_exchange_arbitrage, {"intermediate_currency": "EUR"}, "must differ"),
        (calculate_currency_exchange_arbitrage, {"transfer_fee_fixed": 20_000}, "fees must be below the amount"),
    ],
)  # fmt: skip
def test_impossible_input_says_what_is_allowed(tool, changes, message):
    line = tool(**BASE[tool] | changes)
    assert line.startswith("Error: ") and message in line


def test_a_payoff_that_never_ends_is_an_error():
    debts = [{"balance": 10_000, "rate": 0.30, "minimum": 100, "type": "credit_card"}]
    line = analyze_debt_payoff_strategy(**DEBT | {"debts": debts})
    assert line.startswith("Error: the debts are not paid off within 600 months")


JUNK = [
    None,
    True,
    "",
    "abc",
    [],
    {},
    [{}],
    {"a": None},
    {"life": math.nan},
    -1,
    0,
    1e300,
    math.nan,
    math.inf,
    10**40,
]


@pytest.mark.parametrize("tool", TOOL_FUNCTIONS)
def test_no_value_makes_a_tool_raise(tool):
    for name in BASE[tool]:
        for value in JUNK:
            line = tool(**BASE[tool] | {name: value})
            assert isinstance(line, str) and line and "\n" not in line
            assert len(line) < 400 and "$nan" not in line


@pytest.mark.parametrize("tool", TOOL_FUNCTIONS)
def test_a_whole_number_may_come_as_a_float(tool):
    floats = {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in BASE[tool].items()
    }
    assert tool(**floats) == tool(**BASE[tool])


# One other value per parameter, with what it needs to matter.
OTHER = {
    calculate_portfolio_allocation: dict(
        total_investment=5, risk_tolerance="aggressive", time_horizon_years=3, current_age=60, retirement_age=42,
        income_need_percentage=0, existing_allocations={}, esg_preference=True, tax_loss_harvesting=True,
        rebalancing_frequency="monthly", inflation_protection=True, liquidity_requirement="immediate",
    ),
    calculate_mortgage_affordability: dict(
        annual_income=90_000, monthly_debts=2_000, down_payment=50_000, credit_score=650, loan_type="fha",
        property_state="NJ", property_tax_rate=None, hoa_fees=50, homeowners_insurance=80, pmi_required=False,
        interest_rate_override=0.07, loan_term_years=15,
    ),
    optimize_tax_strategy: dict(
        gross_income=50_000, filing_status="married", state="CA", retirement_contributions={"hsa": 1_000},
        capital_gains_short=100, capital_gains_long=100, dividend_income_qualified=100,
        dividend_income_ordinary=100, itemized_deductions=20_000, dependents=1, self_employment_income=-100,
        rental_income=-100,
    ),
    calculate_retirement_readiness: dict(
        current_age=50, retirement_age=63, current_savings=0, annual_contribution=0, employer_match_percent=0,
        expected_return=0.04, inflation_rate=0.02, desired_retirement_income=60_000,
        social_security_estimate=9_000, pension_income=9_000, healthcare_cost_annual=None, life_expectancy=70,
    ),
    analyze_debt_payoff_strategy: dict(
        debts=DEBT["debts"][1:], monthly_payment_budget=300, strategy="snowball",
        extra_payment_allocation="high_interest_only", interest_rate_threshold=0.3, consolidation_available=True,
        consolidation_rate=0.02, balance_transfer_fee=0.03, credit_score_impact_weight=1,
    ),
    calculate_insurance_needs: dict(
        age=52, annual_income=70_000, dependents=1, mortgage_balance=0, other_debts=0,
        existing_coverage={"life": 1_000}, health_status="poor", occupation_risk="high",
        years_until_retirement=10, spouse_income=0, college_funding_need=9_000, final_expenses=0,
    ),
    calculate_education_funding: dict(
        child_current_age=3, college_start_age=20, years_of_college=4, current_annual_cost=None,
        education_inflation_rate=0.04, current_savings=0, monthly_contribution=50, expected_return=0.05,
        financial_aid_expected=900, student_contribution_percent=0.5, state_residency="OR", school_type="community",
    ),
    calculate_currency_exchange_arbitrage: dict(
        base_currency="CHF", target_currency="GBP", amount=50, exchange_method="wire", transfer_fee_percent=0,
        transfer_fee_fixed=0, intermediate_currency="GBP", spot_rate_override=0.9, forward_contract_months=6,
        hedging_strategy="collar", tax_reporting_required=True,
    ),
}  # fmt: skip
# What must hold as well for a parameter to matter.
CONTEXT = {
    "interest_rate_threshold": {"extra_payment_allocation": "high_interest_only"},
    "consolidation_available": {"consolidation_rate": 0.02},
    "consolidation_rate": {"consolidation_available": True, "consolidation_rate": 0.05},
    "balance_transfer_fee": {"consolidation_available": True, "consolidation_rate": 0.02},
    "credit_score_impact_weight": {"strategy": "hybrid", "credit_score_impact_weight": 0},
    "years_until_retirement": {"dependents": 1},
    "state_residency": {"monthly_contribution": 50},
    "school_type": {"current_annual_cost": None},
    "intermediate_currency": {"spot_rate_override": 0.8},
    "forward_contract_months": {"hedging_strategy": "option"},
    "hedging_strategy": {"forward_contract_months": 6},
    "credit_score": {"interest_rate_override": None},
    "property_state": {"property_tax_rate": None},
    "pmi_required": {"down_payment": 50_000},
}


@pytest.mark.parametrize("tool", TOOL_FUNCTIONS)
def test_every_parameter_matters(tool):
    assert OTHER[tool].keys() == BASE[tool].keys()
    for name, value in OTHER[tool].items():
        base = BASE[tool] | CONTEXT.get(name, {})
        line = tool(**base | {name: value})
        assert not tool(**base).startswith("Error"), name
        assert line != tool(**base), f"{name} is ignored"


@pytest.mark.parametrize("tool", TOOL_FUNCTIONS)
def test_schema_describes_every_parameter(tool):
    schema = pytest.importorskip("transformers.utils").get_json_schema(tool)["function"]
    properties = schema["parameters"]["properties"]
    assert schema["name"] == tool.__name__ and list(properties) == list(inspect.signature(tool).parameters)
    assert 9 <= len(properties) <= 12
    assert schema["parameters"]["required"] == list(properties)  # Optional, yet without a default
    assert all(len(entry["description"]) > 15 for entry in properties.values())


def test_schemas_fill_the_preamble_of_the_default_job():
    """About the 5,800 tokens of the benchmarks' shape `recipe`."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "qwen_tokenizer" / "qwen2_5"
    if not folder.exists():
        pytest.skip("needs the published Qwen2.5 tokenizer")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    schemas = [transformers.utils.get_json_schema(tool) for tool in TOOL_FUNCTIONS]
    messages = [{"role": "user", "content": "hi"}]
    count = len(tokenizer.apply_chat_template(messages, tools=schemas, return_dict=False))
    count -= len(tokenizer.apply_chat_template(messages, return_dict=False))
    assert 5_700 <= count <= 6_100


def test_all_states_have_rates():
    assert len(STATES) == 51 and {"DC", "PR"} & set(STATES) == {"DC"}


def test_money_and_shares_never_show_a_negative_zero():
    assert [usd(-0.2), usd(1234.6), usd(-1500)] == ["$0", "$1,235", "-$1,500"]
    assert [percent(-0.00001), percent(0.065), percent(0.06875, 3)] == ["0.0%", "6.5%", "6.875%"]


def _dollars(line: str, label: str) -> int:
    return int(line.split(f"{label} $")[1].split(" ")[0].rstrip(",)").replace(",", ""))
