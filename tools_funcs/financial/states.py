"""Tax rates of the US states and the District of Columbia.

Income tax: the flat rate, or for states with brackets a typical effective rate, as a
ratio of taxable income (2024). Property tax: the average yearly rate as a ratio of the
home's value (2024, rounded to 0.05 %). Both are planning figures, not law.
"""

# code: (income tax, property tax)
_RATES = {
    "AL": (0.045, 0.0040), "AK": (0.0, 0.0105), "AZ": (0.025, 0.0050), "AR": (0.039, 0.0060),
    "CA": (0.060, 0.0070), "CO": (0.044, 0.0050), "CT": (0.050, 0.0180), "DE": (0.052, 0.0055),
    "DC": (0.065, 0.0060), "FL": (0.0, 0.0080), "GA": (0.0539, 0.0085), "HI": (0.070, 0.0030),
    "ID": (0.058, 0.0055), "IL": (0.0495, 0.0205), "IN": (0.0305, 0.0080), "IA": (0.048, 0.0145),
    "KS": (0.052, 0.0130), "KY": (0.040, 0.0080), "LA": (0.036, 0.0055), "ME": (0.062, 0.0100),
    "MD": (0.048, 0.0100), "MA": (0.050, 0.0105), "MI": (0.0425, 0.0130), "MN": (0.065, 0.0105),
    "MS": (0.047, 0.0070), "MO": (0.043, 0.0090), "MT": (0.054, 0.0070), "NE": (0.052, 0.0160),
    "NV": (0.0, 0.0050), "NH": (0.0, 0.0175), "NJ": (0.050, 0.0210), "NM": (0.046, 0.0070),
    "NY": (0.058, 0.0155), "NC": (0.045, 0.0075), "ND": (0.019, 0.0100), "OH": (0.031, 0.0140),
    "OK": (0.044, 0.0085), "OR": (0.085, 0.0085), "PA": (0.0307, 0.0135), "RI": (0.045, 0.0125),
    "SC": (0.055, 0.0055), "SD": (0.0, 0.0110), "TN": (0.0, 0.0060), "TX": (0.0, 0.0160),
    "UT": (0.0465, 0.0055), "VT": (0.060, 0.0170), "VA": (0.054, 0.0080), "WA": (0.0, 0.0085),
    "WV": (0.043, 0.0055), "WI": (0.052, 0.0145), "WY": (0.0, 0.0060),
}  # fmt: skip

STATES = tuple(_RATES)
INCOME_TAX = {code: income for code, (income, _) in _RATES.items()}
PROPERTY_TAX = {code: rate for code, (_, rate) in _RATES.items()}
