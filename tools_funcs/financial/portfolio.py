"""Portfolio allocation: a strategic mix with its expected return and risk."""

import math
from typing import Literal

from tools_funcs.financial.common import (
    choice,
    first_error,
    flag,
    number,
    percent,
    positive,
    table,
    usd,
    whole,
)

EQUITY_SHARE = {
    "conservative": 0.20,
    "moderate_conservative": 0.40,
    "moderate": 0.60,
    "moderate_aggressive": 0.75,
    "aggressive": 0.90,
}
CASH_SHARE = {"immediate": 0.15, "short_term": 0.10, "medium_term": 0.05, "long_term": 0.02}
# Yearly trading cost as a ratio of the portfolio.
REBALANCING_COST = {
    "monthly": 0.0012,
    "quarterly": 0.0006,
    "semi_annual": 0.0004,
    "annual": 0.0002,
    "threshold_based": 0.0003,
}
GROUP_OF = {
    "equity_us_large": "equity",
    "equity_us_small": "equity",
    "equity_intl_dev": "equity",
    "equity_emerging": "equity",
    "fixed_income_govt": "bonds",
    "fixed_income_corp": "bonds",
    "fixed_income_high_yield": "bonds",
    "real_estate": "real assets",
    "commodities": "real assets",
    "alternatives": "real assets",
    "cash": "cash",
}
YEARLY_RETURN = {"equity": 0.085, "bonds": 0.045, "real assets": 0.065, "cash": 0.03}
VOLATILITY = {"equity": 0.16, "bonds": 0.06, "real assets": 0.14, "cash": 0.01}
CORRELATION = {("equity", "bonds"): 0.1, ("equity", "real assets"): 0.6, ("bonds", "real assets"): 0.2}
ESG_FEE = 0.002
LINKED_BOND_DISCOUNT = 0.0025
HARVESTING_GAIN = 0.003


def calculate_portfolio_allocation(
    total_investment: float,
    risk_tolerance: Literal[
        "conservative", "moderate_conservative", "moderate", "moderate_aggressive", "aggressive"
    ],
    time_horizon_years: int,
    current_age: int,
    retirement_age: int,
    income_need_percentage: float,
    existing_allocations: dict[str, float],
    esg_preference: bool,
    tax_loss_harvesting: bool,
    rebalancing_frequency: Literal["monthly", "quarterly", "semi_annual", "annual", "threshold_based"],
    inflation_protection: bool,
    liquidity_requirement: Literal["immediate", "short_term", "medium_term", "long_term"],
) -> str:
    """Split an investment over stocks, bonds, real assets and cash, with expected return, risk and the amount to move. For questions about asset allocation or rebalancing. Amounts in US dollars.

    Args:
        total_investment: Money to invest, holdings included. Write "$1.2M" as 1200000 and "350k" as 350000.
        risk_tolerance: conservative: keep the capital, avoid losses. moderate_conservative: below-average risk. moderate: balanced. moderate_aggressive: above-average risk, leaning to growth. aggressive: maximum growth.
        time_horizon_years: Whole years until the money is needed, 1 to 50.
        current_age: The investor's age in years, 18 to 100.
        retirement_age: Age at which the investor retires, above current_age and at most 110. If not stated: 65.
        income_need_percentage: Share of the portfolio withdrawn each year as a ratio, 0 to 0.10 (4% is 0.04). If not stated: 0.
        existing_allocations: Present holdings as ratios of the total; what is left to 1 is cash. Keys: equity_us_large, equity_us_small, equity_intl_dev, equity_emerging, fixed_income_govt, fixed_income_corp, fixed_income_high_yield, real_estate, commodities, alternatives, cash. Example: {"equity_us_large": 0.3, "cash": 0.2}. If not stated: {}.
        esg_preference: True if only ESG or sustainable funds are wanted. If not stated: false.
        tax_loss_harvesting: True if losses shall be sold to save taxes. If not stated: false.
        rebalancing_frequency: How often the mix is restored; threshold_based: when it drifts. If not stated: annual.
        inflation_protection: True if a hedge against inflation (TIPS, real assets) is wanted. If not stated: false.
        liquidity_requirement: How soon cash may be needed. immediate: days. short_term: months. medium_term: one to three years. long_term: no need soon. If not stated: long_term.

    Returns:
        One line: shares, expected return, risk, amount to trade.
    """
    error = first_error(
        positive("total_investment", total_investment),
        choice("risk_tolerance", risk_tolerance, EQUITY_SHARE),
        whole("time_horizon_years", time_horizon_years, 1, 50),
        whole("current_age", current_age, 18, 100),
        whole("retirement_age", retirement_age, 19, 110),
        number("income_need_percentage", income_need_percentage, 0, 0.10),
        table("existing_allocations", existing_allocations, dict.fromkeys(GROUP_OF, 1.0)),
        flag("esg_preference", esg_preference),
        flag("tax_loss_harvesting", tax_loss_harvesting),
        choice("rebalancing_frequency", rebalancing_frequency, REBALANCING_COST),
        flag("inflation_protection", inflation_protection),
        choice("liquidity_requirement", liquidity_requirement, CASH_SHARE),
    )
    if error:
        return error
    if retirement_age <= current_age:
        return f"Error: retirement_age must be above current_age, got {retirement_age} and {current_age}"
    # Shares written as decimals may sum to 1.0000000000000002.
    if sum(existing_allocations.values()) > 1 + 1e-9:
        return (
            f"Error: existing_allocations must sum to at most 1, got {sum(existing_allocations.values()):.4g}"
        )

    years = min(time_horizon_years, retirement_age - current_age)
    mix = _target_mix(
        EQUITY_SHARE[risk_tolerance],
        CASH_SHARE[liquidity_requirement] + income_need_percentage,
        years,
        inflation_protection,
    )
    gain = sum(share * YEARLY_RETURN[group] for group, share in mix.items())
    gain -= ESG_FEE * mix["equity"] if esg_preference else 0
    gain -= LINKED_BOND_DISCOUNT * mix["bonds"] if inflation_protection else 0
    gain += HARVESTING_GAIN * mix["equity"] if tax_loss_harvesting else 0
    gain -= REBALANCING_COST[rebalancing_frequency]

    shares = ", ".join(f"{group} {percent(share)}" for group, share in mix.items())
    trade = total_investment * _turnover(mix, existing_allocations)
    return (
        f"Allocation: {shares}, Expected Return: {percent(gain, 2)}, "
        f"Risk: {percent(_volatility(mix), 2)}, Amount to Trade: {usd(trade)}"
    )


def _target_mix(equity: float, cash: float, years: int, inflation_protection: bool) -> dict[str, float]:
    """Shares by group: stocks fall by 2 points for each year under ten, a year's income is cash."""
    real_assets = 0.10 if inflation_protection else 0.05
    equity = max(0.10, equity - 0.02 * max(0, 10 - years))
    equity = min(equity, 1 - real_assets - cash)
    # Rounded so that a remainder of 1e-17 is not shown as a share.
    bonds = round(1 - equity - real_assets - cash, 10)
    return {"equity": equity, "bonds": bonds, "real assets": real_assets, "cash": cash}


def _volatility(mix: dict[str, float]) -> float:
    """Standard deviation of the yearly return: √(wᵀ Σ w)."""
    variance = sum((share * VOLATILITY[group]) ** 2 for group, share in mix.items())
    for (a, b), correlation in CORRELATION.items():
        variance += 2 * correlation * mix[a] * mix[b] * VOLATILITY[a] * VOLATILITY[b]
    return math.sqrt(variance)


def _turnover(mix: dict[str, float], existing: dict[str, float]) -> float:
    """Share of the portfolio that must be sold and bought again: ½ Σ |target − present|."""
    present = dict.fromkeys(mix, 0.0)
    for key, share in existing.items():
        present[GROUP_OF[key]] += share
    present["cash"] += 1 - sum(existing.values())
    return sum(abs(mix[group] - present[group]) for group in mix) / 2
