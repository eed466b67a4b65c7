"""The default job's tools: eight financial calculators with 9 to 12 typed parameters each.

Pure functions: fixed tables, no clock, no network, no state. Amounts of money are US
dollars unless a docstring says otherwise, percentages are ratios (6.5 % is 0.065). No
parameter has a Python default: a call names them all, and where a question is silent
the docstring's "If not stated" says which value to write. Input that cannot be is
answered by one line that begins with `Error:` and says what is allowed.

The formulas are the usual ones of financial planning, the tables are planning figures
of 2024. None of this is financial advice.
"""

from tools_funcs.financial.currency import calculate_currency_exchange_arbitrage
from tools_funcs.financial.debt import analyze_debt_payoff_strategy
from tools_funcs.financial.education import calculate_education_funding
from tools_funcs.financial.insurance import calculate_insurance_needs
from tools_funcs.financial.mortgage import calculate_mortgage_affordability
from tools_funcs.financial.portfolio import calculate_portfolio_allocation
from tools_funcs.financial.retirement import calculate_retirement_readiness
from tools_funcs.financial.tax import optimize_tax_strategy

TOOL_FUNCTIONS = [
    calculate_portfolio_allocation,
    calculate_mortgage_affordability,
    optimize_tax_strategy,
    calculate_retirement_readiness,
    analyze_debt_payoff_strategy,
    calculate_insurance_needs,
    calculate_education_funding,
    calculate_currency_exchange_arbitrage,
]
