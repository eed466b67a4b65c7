"""Currency exchange: direct and triangular routes, fees, forwards and hedges."""

import math
from typing import Literal

from tools_funcs.financial.common import LARGEST_AMOUNT, choice, first_error, flag, number, positive, whole

# Units per US dollar and the money-market rate of the currency: a fixed table, averages of 2024.
UNITS_PER_USD = {
    "USD": 1.0,
    "EUR": 0.924,
    "GBP": 0.783,
    "JPY": 151.4,
    "CHF": 0.881,
    "CAD": 1.37,
    "AUD": 1.516,
    "CNY": 7.19,
    "INR": 83.7,
    "BRL": 5.39,
}
INTEREST_RATE = {
    "USD": 0.051,
    "EUR": 0.036,
    "GBP": 0.05,
    "JPY": 0.002,
    "CHF": 0.013,
    "CAD": 0.045,
    "AUD": 0.043,
    "CNY": 0.031,
    "INR": 0.065,
    "BRL": 0.108,
}
# What the dealer keeps of the mid-market rate at each conversion.
SPREAD = {"bank": 0.02, "forex_broker": 0.004, "crypto_bridge": 0.012, "wire": 0.015}
# Cost of the hedge over a year as a ratio of the amount; it grows with the square root of time.
HEDGE_COST = {"none": 0.0, "forward": 0.002, "option": 0.03, "collar": 0.01}
REPORTING_LIMIT_USD = 10_000


def calculate_currency_exchange_arbitrage(
    base_currency: Literal["USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "CNY", "INR", "BRL"],
    target_currency: Literal["USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "CNY", "INR", "BRL"],
    amount: float,
    exchange_method: Literal["bank", "forex_broker", "crypto_bridge", "wire"],
    transfer_fee_percent: float,
    transfer_fee_fixed: float,
    intermediate_currency: Literal["USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "CNY", "INR", "BRL"]
    | None,
    spot_rate_override: float | None,
    forward_contract_months: int,
    hedging_strategy: Literal["none", "forward", "option", "collar"],
    tax_reporting_required: bool,
) -> str:
    """Convert money to another currency after spread, fees and hedging, by the better of the direct route and one through a third currency. For questions about exchanging, wiring or hedging foreign money.

    Args:
        base_currency: ISO code of the currency that is sold; dollars are USD, euros EUR, pounds GBP, yen JPY, francs CHF, yuan CNY, rupees INR, reais BRL.
        target_currency: ISO code of the currency that is bought, other than base_currency.
        amount: Amount to exchange, in units of base_currency. Write "50k" as 50000.
        exchange_method: bank: ordinary bank transfer. forex_broker: currency broker. crypto_bridge: stablecoins or other crypto. wire: international wire (SWIFT). If not stated: bank.
        transfer_fee_percent: Fee as a ratio of the amount, 0 to 0.10 (1.5% is 0.015). If not stated: 0.
        transfer_fee_fixed: Flat fee in units of base_currency. If not stated: 0.
        intermediate_currency: Third currency for a triangular route; null for the direct route only. If not stated: null.
        spot_rate_override: Quoted direct rate in units of target_currency per unit of base_currency; null takes the market rate. If not stated: null.
        forward_contract_months: Months until the exchange takes place, 0 to 24; 0 is now (spot). If not stated: 0.
        hedging_strategy: How the rate is protected until then: not at all, by a forward contract, a currency option, or a collar of two options. If not stated: none.
        tax_reporting_required: True if transfers of 10,000 USD or more must be reported for tax. If not stated: false.

    Returns:
        One line: amount received, effective rate, total cost, route, tax report.
    """
    error = first_error(
        choice("base_currency", base_currency, UNITS_PER_USD),
        choice("target_currency", target_currency, UNITS_PER_USD),
        positive("amount", amount),
        choice("exchange_method", exchange_method, SPREAD),
        number("transfer_fee_percent", transfer_fee_percent, 0, 0.10),
        number("transfer_fee_fixed", transfer_fee_fixed, 0, LARGEST_AMOUNT),
        choice("intermediate_currency", intermediate_currency, (*UNITS_PER_USD, None)),
        number("spot_rate_override", spot_rate_override, 0.0001, 100_000, null_ok=True),
        whole("forward_contract_months", forward_contract_months, 0, 24),
        choice("hedging_strategy", hedging_strategy, HEDGE_COST),
        flag("tax_reporting_required", tax_reporting_required),
    )
    if error:
        return error
    if len({base_currency, target_currency, intermediate_currency}) < 3:
        return "Error: base_currency, target_currency and intermediate_currency must differ"
    sent = amount * (1 - transfer_fee_percent) - transfer_fee_fixed
    if sent <= 0:
        return f"Error: fees must be below the amount of {amount}, got {amount - sent:g}"

    mid = UNITS_PER_USD[target_currency] / UNITS_PER_USD[base_currency]
    kept = 1 - SPREAD[exchange_method]
    rate, route = kept * (mid if spot_rate_override is None else spot_rate_override), "direct"
    # Two conversions pay the spread twice, so this wins only against a poor direct quote.
    if intermediate_currency is not None and kept * kept * mid > rate:
        rate, route = kept * kept * mid, f"via {intermediate_currency}"

    years = forward_contract_months / 12
    if hedging_strategy != "none":
        rate *= _forward_factor(base_currency, target_currency, years)
        rate *= 1 - HEDGE_COST[hedging_strategy] * math.sqrt(years)
    received = sent * rate
    return (
        f"Received: {target_currency} {received:,.2f}, Effective Rate: {received / amount:.4f}, "
        f"Total Cost: {base_currency} {amount - received / mid:,.2f}, Route: {route}, "
        f"Tax Report: {_report(amount / UNITS_PER_USD[base_currency], tax_reporting_required)}"
    )


def _forward_factor(base: str, target: str, years: float) -> float:
    """Forward over spot by covered interest parity: (1 + r_target·t) / (1 + r_base·t)."""
    return (1 + INTEREST_RATE[target] * years) / (1 + INTEREST_RATE[base] * years)


def _report(usd_amount: float, required: bool) -> str:
    return "due" if required and usd_amount >= REPORTING_LIMIT_USD else "not due"
