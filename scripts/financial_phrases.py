"""How people say things: the phrases from which `make_financial_data.py` writes its questions.

Every entry holds the phrases of the training file and, separately, those of the test file; no phrase serves
both. `{}` is the parameter's value, `{month}` and `{year}`
the same money per month or year, `{name}` the value of parameter `name`. A dict has one
entry per value of the parameter: enum values, true and false, "zero", "loss" (below
zero), "number" (any other).
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    """Phrasings with one meaning, by the file they serve."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def P(train: str, test: str) -> Phrases:
    """Phrases from two texts with `|` between phrases."""
    return Phrases(
        tuple(part.strip() for part in train.split("|")), tuple(part.strip() for part in test.split("|"))
    )


AGE = P(
    "I'm {} | age {} | I am {} years old | {} y/o | current age {}",
    "I just turned {} | my age is {} | {} yrs old",
)

PORTFOLIO = {
    "ask": P(
        "How should I split my portfolio? | What asset allocation makes sense for me? | Help me pick an asset mix"
        " | Can you suggest a portfolio allocation? | how much stocks vs bonds should I hold?"
        " | Need an allocation for my investments | What would a sensible mix of stocks and bonds look like?",
        "What should my investments be divided into? | Build me an allocation please | stocks, bonds, cash - how much of each?"
        " | How would you allocate this money?",
    ),
    "total_investment": P(
        "I have {} to invest | {} portfolio | my portfolio is worth {} | {} in total | investing {}",
        "there's {} to put to work | the pot is {} | {} of investable money",
    ),
    "risk_tolerance": {
        "conservative": P(
            "I'm conservative | low risk please | conservative investor | I hate losing money",
            "I can't stomach losses | safety first",
        ),
        "moderate_conservative": P(
            "moderately conservative | a bit less risk than average | risk tolerance: moderate-conservative",
            "slightly cautious | somewhat on the careful side",
        ),
        "moderate": P(
            "moderate risk | I'm a balanced investor | middle-of-the-road risk | risk tolerance is moderate",
            "average risk is fine | neither careful nor bold, just balanced",
        ),
        "moderate_aggressive": P(
            "moderately aggressive | growth-leaning, above-average risk | moderate-aggressive risk profile",
            "a bit more risk than most people | fairly growth oriented but not all in",
        ),
        "aggressive": P(
            "aggressive | I want maximum growth | high risk is fine | aggressive investor",
            "I'm all in on growth, big swings are OK | as risky as it gets",
        ),
    },
    "time_horizon_years": P(
        "I won't need the money for {} years | {}-year horizon | time horizon {} years | investing for {} years",
        "the money can stay put for {} years | I'll touch it in {} years",
    ),
    "current_age": AGE,
    "retirement_age": P(
        "retiring at {} | I want to retire at {} | retirement age {} | plan to stop working at {}",
        "I'll work until {} | done with work at {}",
    ),
    "income_need_percentage": P(
        "I need {} of it per year as income | withdrawing {} a year | {} annual income need | taking out {} every year",
        "I'd live off {} of the portfolio each year | {} yearly draw",
    ),
    "existing_allocations": P(
        "right now I hold {} | currently {} | existing holdings: {} | I already have {}",
        "today it's {} | so far I own {}",
    ),
    "esg_preference": {
        "true": P(
            "ESG funds only | I prefer sustainable investments | socially responsible please | want ESG",
            "nothing unsustainable please | only ethical ESG funds",
        ),
        "false": P(
            "ESG doesn't matter to me | no ESG filter | no need for ESG",
            "I don't care about ESG | skip the ESG stuff",
        ),
    },
    "tax_loss_harvesting": {
        "true": P(
            "use tax-loss harvesting | I want tax loss harvesting | harvest losses for taxes",
            "sell losers to save taxes | turn on loss harvesting",
        ),
        "false": P(
            "no tax-loss harvesting | without harvesting losses",
            "leave out tax loss harvesting | don't harvest losses",
        ),
    },
    "rebalancing_frequency": {
        "monthly": P(
            "rebalance monthly | rebalancing every month",
            "I rebalance once a month | month-by-month rebalancing",
        ),
        "quarterly": P(
            "rebalance quarterly | quarterly rebalancing",
            "I rebalance every quarter | rebalanced each quarter",
        ),
        "semi_annual": P(
            "rebalance twice a year | semi-annual rebalancing",
            "rebalanced every six months | I rebalance each half-year",
        ),
        "annual": P(
            "rebalance once a year | annual rebalancing", "I rebalance every January | rebalanced yearly"
        ),
        "threshold_based": P(
            "rebalance only when it drifts | threshold-based rebalancing",
            "rebalanced when the weights get out of line | rebalance on drift bands",
        ),
    },
    "inflation_protection": {
        "true": P(
            "I want inflation protection | include TIPS | hedge against inflation | inflation-protected please",
            "guard it against inflation | worried about inflation, protect me from it",
        ),
        "false": P(
            "no inflation protection needed | inflation hedge not needed",
            "skip the inflation hedge | I don't need TIPS",
        ),
    },
    "liquidity_requirement": {
        "immediate": P(
            "I may need cash within days | immediate liquidity",
            "must be able to get at cash this week | cash on tap",
        ),
        "short_term": P(
            "I may need cash in a few months | short-term liquidity needs",
            "some of it may be needed this year | cash needed within months",
        ),
        "medium_term": P(
            "might need some cash in 2 years or so | medium-term liquidity",
            "may tap it in one to three years | some cash in a couple of years",
        ),
        "long_term": P(
            "no liquidity needs soon | long-term money, no cash needed",
            "I won't need cash any time soon | it can be locked away",
        ),
    },
}

HOLDINGS = {
    "equity_us_large": P("US large caps | S&P 500 funds", "large US stocks | big US companies"),
    "equity_us_small": P("US small caps | small-cap US stocks", "small US companies | a Russell 2000 fund"),
    "equity_intl_dev": P("international developed stocks | developed-market international equity", "developed foreign stocks | Europe and Japan stocks"),
    "equity_emerging": P("emerging markets | EM stocks", "emerging-market equity | an emerging markets ETF"),
    "fixed_income_govt": P("government bonds | treasuries", "US Treasury bonds | govt bonds"),
    "fixed_income_corp": P("corporate bonds | investment-grade corporates", "corp bonds | company bonds"),
    "fixed_income_high_yield": P("high-yield bonds | junk bonds", "a high yield bond fund | junk-rated debt"),
    "real_estate": P("real estate | REITs", "property funds | a REIT"),
    "commodities": P("commodities | gold and commodities", "a commodity fund | raw materials"),
    "alternatives": P("alternatives | hedge funds", "alternative investments | private equity"),
    "cash": P("cash | money market", "plain cash | savings cash"),
}  # fmt: skip

MORTGAGE = {
    "ask": P(
        "How much house can I afford? | What's the max home price we can afford? | How expensive a home can I buy?"
        " | what mortgage can we get | Can you work out what house price fits my budget?"
        " | House hunting - what's our price limit? | Looking for my maximum purchase price on a home",
        "What's the most I could pay for a home? | Which home price would a lender let me go up to?"
        " | how big of a house budget do I have | Figure out our top price for a house please",
    ),
    "annual_income": P(
        "I make {} a year | household income {} | we earn {} per year | income is {} | salary {} | gross income of {month} a month",
        "we bring in {} a year before taxes | yearly gross: {} | {month} per month gross",
    ),
    "monthly_debts": P(
        "{} a month in other debts | monthly debts {} | car and student loans cost {}/month | paying {} per month on debts",
        "{} goes to loans every month | our debt payments are {} monthly",
    ),
    "down_payment": P(
        "{} down | down payment of {} | I can put {} down | saved {} for the down payment",
        "we'd put in {} up front | {} ready as a down payment",
    ),
    "credit_score": P(
        "credit score {} | FICO {} | my score is {} | score of {}", "credit rating of {} | my FICO sits at {}"
    ),
    "loan_type": {
        "conventional": P(
            "conventional loan | normal conventional mortgage",
            "a standard conventional mortgage | going conventional",
        ),
        "fha": P("FHA loan | going with FHA | FHA mortgage", "using the FHA program | it'd be an FHA"),
        "va": P("VA loan | I'm a veteran so VA | VA mortgage", "using my VA benefit | it'd be a VA"),
        "jumbo": P("jumbo loan | jumbo mortgage | it will be a jumbo", "we need a jumbo | jumbo financing"),
    },
    "property_state": P(
        "house in {} | buying in {} | the home is in {} | {} property",
        "we're looking in {} | it's located in {}",
    ),
    "property_tax_rate": P(
        "property tax {} | property taxes run {} | {} property tax rate",
        "the county taxes homes at {} | {} a year in property tax",
    ),
    "hoa_fees": P(
        "HOA {} a month | HOA fees {} | {}/mo HOA",
        "{} monthly for the HOA | the condo association charges {} a month",
    ),
    "homeowners_insurance": P(
        "home insurance {} a month | homeowners insurance is {}/mo | home insurance costs {year} a year",
        "insuring the house costs {} monthly | {year} per year for homeowners insurance",
    ),
    "pmi_required": {
        "true": P(
            "include PMI if it applies | PMI is required | count in PMI",
            "the bank wants PMI | add PMI where it's due",
        ),
        "false": P(
            "no PMI | PMI is waived | lender doesn't require PMI",
            "my bank won't charge PMI | without mortgage insurance",
        ),
    },
    "interest_rate_override": P(
        "I was quoted {} | rate of {} | my lender offers {} | interest rate {}",
        "the bank's rate is {} | locked in at {}",
    ),
    "loan_term_years": P(
        "{}-year loan | {} year mortgage | {}-yr fixed | over {} years",
        "a {}-year term | paid back in {} years",
    ),
}

TAX = {
    "ask": P(
        "How much tax will I owe? | What's my tax bill going to be? | Estimate my taxes please | Help me plan my taxes"
        " | what do I pay in taxes and can I lower it? | Can you run my 2024 taxes? | How can I cut my tax bill?",
        "What will the IRS and the state take? | Work out my total tax | taxes for 2024?? | Is there a way for me to pay less tax?",
    ),
    "gross_income": P(
        "I earn {} in wages | salary of {} | W-2 income {} | my pay is {} a year | making {}",
        "{} from my job | wages come to {} | my W-2 says {}",
    ),
    "filing_status": {
        "single": P("single | I file single | filing as single", "not married | I file on my own as single"),
        "married": P(
            "married filing jointly | married | my wife and I file jointly",
            "joint return with my husband | we file together as a couple",
        ),
        "head": P(
            "head of household | filing head of household",
            "I'm an unmarried parent, head of household status | HOH filer",
        ),
    },
    "state": P("living in {} | {} resident | I live in {} | state: {}", "my home state is {} | taxed in {}"),
    "retirement_contributions": P(
        "I put {} | contributing {} | contributed {}", "this year I paid {} | I saved {}"
    ),
    "capital_gains_short": P(
        "{} in short-term gains | short term capital gains of {} | sold stocks held under a year for a {} gain",
        "{} profit from quick trades (short term) | short-term gains came to {}",
    ),
    "capital_gains_long": P(
        "{} in long-term gains | long term capital gains of {} | sold stocks held for years for a {} gain",
        "{} gained on shares I held for ages (long term) | long-term gains came to {}",
    ),
    "dividend_income_qualified": P(
        "{} qualified dividends | qualified dividends of {} | got {} in qualified dividends",
        "dividends that are qualified: {} | {} of dividends, all qualified",
    ),
    "dividend_income_ordinary": P(
        "{} ordinary dividends | ordinary dividends of {} | {} in non-qualified dividends and interest",
        "interest and ordinary dividends: {} | {} of interest income",
    ),
    "itemized_deductions": P(
        "itemized deductions {} | I can itemize {} | {} in itemized deductions",
        "deductions add up to {} if I itemize | mortgage interest and charity total {}",
    ),
    "dependents": P(
        "{} kids under 17 | {} young dependents | dependents: {}",
        "raising {} small children | number of kids: {}",
    ),
    "self_employment_income": {
        "number": P(
            "{} from freelancing | side business profit {} | self-employment income of {}",
            "my side gig nets {} | I clear {} as a contractor",
        ),
        "loss": P(
            "my side business lost {} | self-employment loss of {}",
            "the side gig made a {} loss | I lost {} freelancing",
        ),
    },
    "rental_income": {
        "number": P(
            "{} net rental income | rental nets {} | {} from a rental",
            "my tenants leave me {} after costs | net rent {}",
        ),
        "loss": P(
            "rental loss of {} | my rental lost {}", "the rental is {} in the red | I lost {} on the rental"
        ),
    },
}

ACCOUNTS = {
    "traditional_401k": P("401k | traditional 401(k)", "regular 401(k) | pre-tax 401k"),
    "roth_401k": P("Roth 401k | Roth 401(k)", "401k on the Roth side | Roth option of the 401k"),
    "traditional_ira": P("IRA | traditional IRA", "regular IRA | pre-tax IRA"),
    "roth_ira": P("Roth IRA | Roth IRA account", "Roth individual retirement account | IRA of the Roth kind"),
    "hsa": P("HSA | health savings account", "HSA account | health savings plan (HSA)"),
}

RETIREMENT = {
    "ask": P(
        "Am I on track for retirement? | Can I retire on time? | Will my savings last in retirement?"
        " | Check my retirement readiness | how am I doing on retirement savings | Do I save enough to retire?"
        " | Retirement check please",
        "Is my nest egg big enough to retire? | Can I afford to stop working? | will I have enough when I retire?"
        " | Tell me how ready for retirement I am",
    ),
    "current_age": AGE,
    "retirement_age": P(
        "retire at {} | want to retire at {} | retirement at age {} | planning to quit work at {}",
        "I'd stop working at {} | last day of work at {}",
    ),
    "current_savings": P(
        "{} saved so far | I have {} in retirement accounts | savings of {} | nest egg: {}",
        "my 401k and IRA hold {} | put away {} until now",
    ),
    "annual_contribution": P(
        "saving {} a year | I contribute {} per year | {month} a month into my 401k | putting away {} annually",
        "I set aside {} each year | {month} monthly goes to retirement",
    ),
    "employer_match_percent": P(
        "employer matches {} of it | {} employer match | company match {}",
        "my boss adds {} on top of what I save | matched at {}",
    ),
    "expected_return": P(
        "expecting {} returns | {} return | assume my investments return {} a year",
        "growth of {} a year | figure on {} from the market",
    ),
    "inflation_rate": P(
        "{} inflation | assume inflation of {} | inflation at {}",
        "prices rising {} a year | with inflation running {}",
    ),
    "desired_retirement_income": P(
        "I want {} a year in retirement | need {} per year to live on | {month} a month would be enough in retirement"
        " | target retirement income {}",
        "I'd like to spend {} a year once retired | retired life should cost {month} a month",
    ),
    "social_security_estimate": P(
        "Social Security should pay {} a year | SS estimate {} per year | {month}/month from Social Security",
        "I'd get {} yearly from Social Security | Social Security check of {month} a month",
    ),
    "pension_income": P(
        "pension of {} a year | {} pension | my pension pays {} yearly",
        "a {} yearly pension comes on top | plus {} a year of pension",
    ),
    "healthcare_cost_annual": P(
        "healthcare {} a year | medical costs of {} per year | health costs around {} annually",
        "doctors and drugs {} a year | {} yearly for health",
    ),
    "life_expectancy": P(
        "plan until age {} | life expectancy {} | money has to last until {}",
        "I may well live to {} | should hold out to age {}",
    ),
}

DEBT = {
    "ask": P(
        "What's the best way to pay off my debts? | How long until I'm debt free? | Help me get out of debt"
        " | make me a debt payoff plan | When will these be paid off? | Which debt should I attack first?"
        " | How much interest will I pay till I'm done?",
        "How do I get rid of what I owe? | when am I out of debt | Plan my debt payments please | Show me the way to zero debt",
    ),
    "debts": P("I owe {} | my debts: {} | here's what I have: {} | debts are {}", "this is what I owe: {} | outstanding: {}"),
    "monthly_payment_budget": P(
        "I can pay {} a month | budget of {} per month | {} monthly for debts | have {}/month in total",
        "{} a month is what I can spare for all of it | up to {} every month",
    ),
    "strategy": {
        "avalanche": P("avalanche method | highest rate first | use avalanche", "start with the most expensive rate | the avalanche way"),
        "snowball": P("snowball method | smallest balance first | use snowball", "knock out the little ones first | the snowball way"),
        "hybrid": P("hybrid strategy | mix of avalanche and snowball | use a hybrid", "somewhere between snowball and avalanche | the hybrid way"),
    },
    "extra_payment_allocation": {
        "single_focus": P("all extra on one debt | put the extra on a single debt", "one debt at a time gets the extra | extra goes to just one"),
        "proportional": P("spread the extra proportionally | split extra across all debts", "extra shared among all of them by balance | every debt gets its part of the extra"),
        "high_interest_only": P("extra only on high-interest debts | extra just for the high rate ones", "nothing extra on the cheap debts, only on high interest | extra reserved for high-interest debt"),
    },
    "interest_rate_threshold": P("high interest means {} or more | threshold {}", "I call {} and up high interest | the cut-off is {}"),
    "consolidation_available": {
        "true": P(
            "I could consolidate at {consolidation_rate} | got a consolidation offer at {consolidation_rate} | balance transfer available at {consolidation_rate}",
            "a bank would roll them into one loan at {consolidation_rate} | consolidation loan on the table for {consolidation_rate}",
        ),
        "false": P("no consolidation available | consolidating is not an option", "nobody will consolidate them for me | no consolidation offers"),
    },
    "balance_transfer_fee": P("{} transfer fee | fee for that is {} | with a {} fee", "they charge {} to move it | {} up-front fee"),
    "credit_score_impact_weight": P(
        "credit score weight {} | weigh the credit score at {}", "credit score impact counts {} | set the score weight to {}"
    ),
}  # fmt: skip

DEBT_NAMES = {
    "credit_card": P("credit card | Visa card | store credit card", "Amex card | Mastercard"),
    "student_loan": P("student loan | federal student loan", "college loan (student) | student debt"),
    "auto_loan": P("car loan | auto loan", "truck loan (auto) | loan on the car"),
    "personal_loan": P("personal loan | medical debt", "loan from my bank (personal) | payday loan"),
}
DEBT_LINES = P(
    "{type} {balance} at {rate} (min {minimum}) | {type}: {balance}, {rate}, {minimum} minimum"
    " | {balance} on a {type} at {rate} with {minimum}/mo minimum",
    "{type} of {balance} with {rate} interest and {minimum} min. payment | {type} - {balance} - {rate} - {minimum} per month minimum",
)

INSURANCE = {
    "ask": P(
        "How much life insurance do I need? | What insurance coverage should I have? | Am I underinsured?"
        " | insurance check for my family please | Do I need more life and disability cover?"
        " | What coverage would protect my family?",
        "How much cover is right for me? | Work out my insurance gap | is my family protected if I die | What life and disability insurance am I missing?",
    ),
    "age": AGE,
    "annual_income": P(
        "I earn {} | income {} a year | making {} per year | salary: {}", "my job pays {} | I bring home {} gross a year"
    ),
    "dependents": P("{} kids | {} dependents | I have {} children", "{} little ones depend on me | supporting {} kids"),
    "mortgage_balance": P("{} left on the mortgage | mortgage balance {} | we owe {} on the house", "still {} to pay on our home | home loan of {}"),
    "other_debts": P("other debts {} | {} in car and student loans | {} of other debt", "besides that {} of loans | cards and car loan: {}"),
    "existing_coverage": P("I already have {} | current coverage: {} | covered with {}", "so far insured for {} | existing policies: {}"),
    "health_status": {
        "excellent": P("excellent health | perfectly healthy non-smoker", "in great shape, excellent health | no health issues whatsoever"),
        "good": P("good health | healthy, minor issues", "health is good | just minor health issues"),
        "fair": P("fair health | a chronic condition", "health is so-so (fair) | I live with a chronic illness"),
        "poor": P("poor health | seriously ill", "health is poor | serious medical problems"),
    },
    "occupation_risk": {
        "low": P("desk job | office work", "I sit at a desk all day | white-collar job"),
        "medium": P("some physical work | job is partly physical", "on my feet half the day, medium risk job | moderately physical job"),
        "high": P("dangerous job | manual labor on construction sites | high-risk occupation", "hazardous work | I do roofing, risky work"),
    },
    "years_until_retirement": P(
        "{} years to retirement | retiring in {} years | {} working years left", "I'll work {} more years | retirement is {} years off"
    ),
    "spouse_income": {
        "number": P("my wife makes {} | husband earns {} | spouse income {}", "my partner brings in {} | {} from my spouse's job"),
        "zero": P("my wife stays home, no income | spouse doesn't earn anything", "husband is not working (no pay) | my partner earns nothing"),
    },
    "college_funding_need": P("want {} for college | college fund need {} | {} for the kids' college", "their studies should get {} | {} set aside for college if I'm gone"),
    "final_expenses": P("final expenses {} | {} for the funeral | funeral costs of {}", "burial and estate costs {} | {} to settle everything"),
}  # fmt: skip

COVERAGES = {
    "life": P("{} of life insurance | a {} life policy", "life cover of {} | {} on my life"),
    "disability": P("{} a month of disability cover | disability insurance paying {} monthly", "{}/mo if I'm disabled | disability benefit of {} a month"),
    "ltc": P("{} a month of long-term care cover | long-term care insurance paying {} monthly", "{}/mo for long-term care | an LTC benefit of {} a month"),
}  # fmt: skip

EDUCATION = {
    "ask": P(
        "Are we saving enough for college? | How much should we save for college? | Will the college fund be enough?"
        " | college savings check please | What will college cost us and are we on track?"
        " | How big is our college funding gap?",
        "Does our 529 plan cover her studies? | what's missing for our kid's college | Can we pay for university like this?"
        " | Work out the college bill for our child",
    ),
    "child_current_age": {
        "number": P("my son is {} | our daughter is {} | kid is {} years old | child age {}", "she's {} now | our boy turned {}"),
        "zero": P("we have a newborn | baby was just born", "our baby is a few weeks old | she was born last month"),
    },
    "college_start_age": P("starting college at {} | college at age {} | would start at {}", "off to college when {} | first semester at age {}"),
    "years_of_college": P("{} years of college | a {}-year degree | studying {} years", "{} years at school | degree takes {} years"),
    "current_annual_cost": P(
        "costs {} a year today | the school charges {} per year | annual cost {}", "one year there is {} right now | {} for a year at today's prices"
    ),
    "education_inflation_rate": P(
        "college costs rise {} a year | {} education inflation | tuition inflation {}", "prices for college up {} each year | tuition going up {} a year"
    ),
    "current_savings": P("{} saved already | {} in a 529 | we have {} saved", "the 529 holds {} | {} put aside until now"),
    "monthly_contribution": P(
        "saving {} a month | putting in {} monthly | we add {} per month | {year} a year goes into the plan",
        "{} goes in every month | contributions of {year} yearly",
    ),
    "expected_return": P("{} return | expecting {} a year on investments | fund returns {}", "the plan grows {} a year | earning {} on it"),
    "financial_aid_expected": P("{} a year in aid | expecting {} yearly scholarship | financial aid {} per year", "grants of {} each year | a scholarship worth {} a year"),
    "student_contribution_percent": P("the student pays {} | kid covers {} himself | {} paid by the student", "our child chips in {} | {} comes from the student's own jobs"),
    "state_residency": P("we live in {} | {} residents | family lives in {} | state: {}", "home is in {} | our state is {}"),
    "school_type": {
        "public_instate": P("in-state public university | state school, in-state", "public college in our own state | in-state tuition at a public school"),
        "public_outstate": P("out-of-state public university | public school out of state", "a public college in another state | out-of-state tuition at a public school"),
        "private": P("private university | private college", "a private school | one of the private universities"),
        "community": P("community college | local community college", "a two-year community college | community college near us"),
    },
}  # fmt: skip

CURRENCY = {
    "ask": P(
        "Convert {amount} {base_currency} to {target_currency} | How much {target_currency} do I get for {amount} {base_currency}?"
        " | I want to exchange {amount} {base_currency} into {target_currency} | changing {amount} {base_currency} to {target_currency}"
        " | What's {amount} {base_currency} worth in {target_currency} after fees? | Need to turn {amount} {base_currency} into {target_currency}",
        "Swap {amount} {base_currency} for {target_currency} | What would {amount} {base_currency} bring me in {target_currency}?"
        " | selling {amount} {base_currency}, buying {target_currency} - what arrives? | How many {target_currency} come out of {amount} {base_currency}?",
    ),
    "exchange_method": {
        "bank": P("through my bank | using a normal bank transfer", "the bank does it | over my regular bank"),
        "forex_broker": P("through a forex broker | using an FX broker", "my forex trading account does it | with a currency broker"),
        "crypto_bridge": P("over a crypto bridge | using stablecoins", "by way of crypto | through USDC tokens"),
        "wire": P("by international wire | wire transfer", "sent by SWIFT wire | wired abroad"),
    },
    "transfer_fee_percent": P("{} transfer fee | fee of {} | they charge {}", "{} is taken as a fee | a {} commission"),
    "transfer_fee_fixed": P("flat fee {} | {} fixed fee | plus a {} flat charge", "{} per transfer on top | a one-time {} charge"),
    "intermediate_currency": P("check going via {} | maybe through {} | compare a route through {}", "see if {} in between is better | triangular through {} too"),
    "spot_rate_override": P("quoted rate {} | my rate is {} | they offer a rate of {}", "I'd get {} as the rate | the quote says {}"),
    "forward_contract_months": P("in {} months | exchange happens {} months from now | needed in {} months", "{} months ahead | the deal is due after {} months"),
    "hedging_strategy": {
        "none": P("no hedging | unhedged", "without any hedge | I won't hedge"),
        "forward": P("hedge with a forward | lock it with a forward contract", "forward hedge | a forward should fix the rate"),
        "option": P("hedge with an option | buy a currency option", "option hedge | protected by an FX option"),
        "collar": P("use a collar | hedge with an option collar", "collar hedge | protected by a collar"),
    },
    "tax_reporting_required": {
        "true": P("I need tax reporting | has to be reported for taxes | include tax reporting", "the tax office must know about it | tax report needed"),
        "false": P("no tax reporting | no need to report it", "nothing to report for tax | tax report not needed"),
    },
}  # fmt: skip

CURRENCIES = {
    "USD": P("USD | US dollars", "U.S. dollars | American dollars"),
    "EUR": P("EUR | euros", "euro | Euros (EUR)"),
    "GBP": P("GBP | British pounds", "pounds sterling | UK pounds"),
    "JPY": P("JPY | Japanese yen", "yen | yen (JPY)"),
    "CHF": P("CHF | Swiss francs", "francs (CHF) | Swiss money (CHF)"),
    "CAD": P("CAD | Canadian dollars", "Canadian $ | CAD dollars"),
    "AUD": P("AUD | Australian dollars", "Aussie dollars | AUD dollars"),
    "CNY": P("CNY | Chinese yuan", "yuan | renminbi (CNY)"),
    "INR": P("INR | Indian rupees", "rupees | rupees (INR)"),
    "BRL": P("BRL | Brazilian reais", "reais | Brazilian real"),
}

STATE_NAMES = {
    "AL": "Alabama", "AK": "Alaska", "AZ": "Arizona", "AR": "Arkansas", "CA": "California", "CO": "Colorado",
    "CT": "Connecticut", "DE": "Delaware", "DC": "Washington DC", "FL": "Florida", "GA": "Georgia", "HI": "Hawaii",
    "ID": "Idaho", "IL": "Illinois", "IN": "Indiana", "IA": "Iowa", "KS": "Kansas", "KY": "Kentucky",
    "LA": "Louisiana", "ME": "Maine", "MD": "Maryland", "MA": "Massachusetts", "MI": "Michigan", "MN": "Minnesota",
    "MS": "Mississippi", "MO": "Missouri", "MT": "Montana", "NE": "Nebraska", "NV": "Nevada", "NH": "New Hampshire",
    "NJ": "New Jersey", "NM": "New Mexico", "NY": "New York", "NC": "North Carolina", "ND": "North Dakota",
    "OH": "Ohio", "OK": "Oklahoma", "OR": "Oregon", "PA": "Pennsylvania", "RI": "Rhode Island",
    "SC": "South Carolina", "SD": "South Dakota", "TN": "Tennessee", "TX": "Texas", "UT": "Utah", "VT": "Vermont",
    "VA": "Virginia", "WA": "Washington State", "WV": "West Virginia", "WI": "Wisconsin", "WY": "Wyoming",
}  # fmt: skip

PHRASES = {
    "calculate_portfolio_allocation": PORTFOLIO,
    "calculate_mortgage_affordability": MORTGAGE,
    "optimize_tax_strategy": TAX,
    "calculate_retirement_readiness": RETIREMENT,
    "analyze_debt_payoff_strategy": DEBT,
    "calculate_insurance_needs": INSURANCE,
    "calculate_education_funding": EDUCATION,
    "calculate_currency_exchange_arbitrage": CURRENCY,
}
