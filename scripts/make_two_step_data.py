"""Writes data/two_step_train.jsonl and data/two_step_test.jsonl.

    python scripts/make_two_step_data.py [--output_dir data]

Each question needs two calls, and the second one's `amount` is the number that the first
one returns. Columns: `prompt` (system and user message), `answer` (what the second call
returns), `tool_call` (both gold calls, in order). The same seed gives the same bytes;
the two files share no phrasing.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tools_funcs.two_step_tools import TOOL_FUNCTIONS, UNITS_PER_USD

SEED = 2024
ROWS_PER_CHAIN = {"train": 50, "test": 10}
SYSTEM = (
    "You are a financial assistant. A question needs two tool calls: "
    "make the first one, read its result, and use that number as the amount of the second."
)
TOOLS = {tool.__name__: tool for tool in TOOL_FUNCTIONS}
# (first tool, second tool): its questions; {share} and the rates are shown in percent.
QUESTIONS = {
    ("grow_savings", "convert_currency"): {
        "train": [
            "I put {amount} {from_currency} away at {annual_rate} for {years} years. How much is that in {to_currency} at the end?",
            "{amount} {from_currency} grows {annual_rate} a year over {years} years, then I change it all into {to_currency}. What do I get?",
            "saving {amount} {from_currency}, {annual_rate} interest, {years} years - worth how many {to_currency} then?",
        ],
        "test": [
            "After {years} years at {annual_rate} I swap my {amount} {from_currency} deposit, interest included, for {to_currency}. Result?",
            "How many {to_currency} could I buy with a {amount} {from_currency} deposit once it earned {annual_rate} for {years} years?",
        ],
    },
    ("convert_currency", "grow_savings"): {
        "train": [
            "Change {amount} {from_currency} to {to_currency} and leave it in the bank for {years} years at {annual_rate}. What will it be worth?",
            "I convert {amount} {from_currency} into {to_currency}, then save it {years} years with {annual_rate} a year. Final amount?",
            "{amount} {from_currency} exchanged for {to_currency} and invested at {annual_rate}, {years} years. how much in the end",
        ],
        "test": [
            "If I first turn {amount} {from_currency} into {to_currency} and then earn {annual_rate} on it for {years} years, where do I end up?",
            "{years} years at {annual_rate} on whatever {amount} {from_currency} gives in {to_currency}: what comes out?",
        ],
    },
    ("convert_currency", "monthly_loan_payment"): {
        "train": [
            "A house costs {amount} {from_currency}. I borrow all of it in {to_currency} at {annual_rate} over {years} years. Monthly payment?",
            "What would I pay a month in {to_currency} for a {years}-year loan at {annual_rate} on {amount} {from_currency}?",
            "loan for a car worth {amount} {from_currency}, taken in {to_currency}, {annual_rate}, {years} years - what's the monthly rate",
        ],
        "test": [
            "My {to_currency} bank lends me the equivalent of {amount} {from_currency} at {annual_rate}, repaid in {years} years. How much each month?",
            "Financing {amount} {from_currency} in {to_currency}: {years} years, {annual_rate} interest. Tell me the installment.",
        ],
    },
    ("take_share", "monthly_loan_payment"): {
        "train": [
            "I finance {share} of a {amount} dollar home with a {years}-year loan at {annual_rate}. What is the monthly payment?",
            "The bank lends {share} of the {amount} price, {annual_rate} for {years} years. How much per month?",
            "price {amount}, borrowing {share} of it at {annual_rate} over {years} yrs, monthly payment?",
        ],
        "test": [
            "Of the {amount} that it costs I need a loan for {share}, at {annual_rate} and {years} years. What will I pay monthly?",
            "{years}-year mortgage on {share} of {amount}, rate {annual_rate}: the installment please",
        ],
    },
    ("grow_savings", "take_share"): {
        "train": [
            "I invest {amount} at {annual_rate} for {years} years and may then spend {share} of it. How much is that?",
            "{amount} saved for {years} years at {annual_rate}; {share} of the final sum goes to my son. What does he get?",
            "what's {share} of the value of {amount} after {years} years at {annual_rate}",
        ],
        "test": [
            "Once my {amount} has grown {annual_rate} a year for {years} years I give away {share} of everything. How big is the gift?",
            "{share} of what {amount} becomes in {years} years with {annual_rate} interest - how much would that be?",
        ],
    },
}  # fmt: skip


def draw_values(rng: random.Random) -> dict:
    """Values for all placeholders; a question uses those that it names."""
    source, target = rng.sample(list(UNITS_PER_USD), 2)
    return {
        "amount": rng.randrange(2_000, 400_000, 500),
        "annual_rate": rng.randrange(100, 950, 25) / 10_000,
        "years": rng.randint(3, 30),
        "from_currency": source,
        "to_currency": target,
        "share": rng.randrange(5, 95, 5) / 100,
    }


def make_row(chain: tuple[str, str], text: str, rng: random.Random) -> dict:
    """One row of the chain; its second call takes the number in the first one's result."""
    values = draw_values(rng)
    first = _call(chain[0], values)
    result = TOOLS[chain[0]](**first["arguments"])
    second = _call(chain[1], values | {"amount": float(result.split(": ")[1])})
    shown = values | {
        "amount": rng.choice(["{:,}", "{}"]).format(values["amount"]),
        "annual_rate": f"{values['annual_rate'] * 100:g}%",
        "share": f"{values['share'] * 100:g}%",
    }
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text.format(**shown)},
        ],
        "answer": TOOLS[chain[1]](**second["arguments"]),
        "tool_call": [first, second],
    }


def _call(name: str, values: dict) -> dict:
    code = TOOLS[name].__code__
    return {"name": name, "arguments": {key: values[key] for key in code.co_varnames[: code.co_argcount]}}


def make_rows(split: str, seed: int = SEED) -> Iterator[dict]:
    """The rows of one file, chains shuffled among each other."""
    rng = random.Random(f"{seed} {split}")
    rows = [
        make_row(chain, rng.choice(texts[split]), rng)
        for chain, texts in QUESTIONS.items()
        for _ in range(ROWS_PER_CHAIN[split])
    ]
    rng.shuffle(rows)
    yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent.parent / "data")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS_PER_CHAIN:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(split)]
        # Bytes, so that no platform changes the line ends.
        (folder / f"two_step_{split}.jsonl").write_bytes("".join(lines).encode())
        print(f"two_step_{split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
