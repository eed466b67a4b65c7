"""Writes data/financial_train.jsonl and data/financial_test.jsonl.

    python scripts/make_financial_data.py [--output_dir data]

Each row holds `prompt` (system and user message), `answer` (what the gold call returns)
and `tool_call` (the gold call). A question states all required parameters and some of
the others; a parameter it does not state has the docstring's "If not stated" value.
The same seed gives the same bytes. The two files share no question and no phrase.
"""

import argparse
import inspect
import json
import random
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import financial_phrases as phrases
from financial_samplers import SAMPLERS, UNSTATED, Draw

from tools_funcs.financial_tools_complex import TOOL_FUNCTIONS

SEED = 2024
ROWS_PER_TOOL = {"train": 150, "test": 24}
SYSTEM = (
    "You are a financial assistant. Answer each question with exactly one tool call. "
    "Write amounts as plain numbers and percentages as ratios. Give every parameter of the tool; "
    'where the question does not state one, write the value after "If not stated" in its description.'
)
RATIOS = {
    "income_need_percentage",
    "property_tax_rate",
    "interest_rate_override",
    "employer_match_percent",
    "expected_return",
    "inflation_rate",
    "rate",
    "interest_rate_threshold",
    "consolidation_rate",
    "balance_transfer_fee",
    "education_inflation_rate",
    "student_contribution_percent",
    "transfer_fee_percent",
}
STATE_PARAMETERS = {"state", "property_state", "state_residency"}
CURRENCY_PARAMETERS = {"base_currency", "target_currency", "intermediate_currency"}
# Of the other numbers, whole ones are ages, years, months, scores and counts; fractions are money, but not these.
PLAIN = {"spot_rate_override", "credit_score_impact_weight"}
# Money in the base currency: no dollar sign.
UNSIGNED = {"amount", "transfer_fee_fixed"}


def documented_defaults(tool: Callable) -> dict:
    """Parameter: the value after "If not stated:" in the docstring, where there is one."""
    found = re.findall(r"^ +(\w+): .*If not stated: (.+)\.$", inspect.getdoc(tool), re.MULTILINE)
    return {name: _literal(text) for name, text in found}


def _literal(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class Writer:
    """Says parameters in words.

    Args:
        rng: the only source of randomness.
        split: "train" or "test", whose phrases are used.
        tool: the tool that the question is for.
        stated: the parameters that the question must state.
    """

    def __init__(self, rng: random.Random, split: str, tool: Callable, stated: dict):
        self.rng, self.split, self.stated = rng, split, stated
        hints = typing.get_type_hints(tool)
        self.amounts = {name for name in hints if hints[name] in (float, float | None)} - PLAIN

    def question(self, entries: dict) -> str:
        """The question's text: what is asked, and one clause for each stated parameter."""
        ask = self.pick(entries["ask"])
        # What the asking sentence or another clause names needs no separate clause.
        named = set(re.findall(r"\{(\w+)\}", ask)) | {"consolidation_rate"}
        clauses = [self.clause(name, entries[name]) for name in self.stated if name not in named]
        self.rng.shuffle(clauses)
        return _singular(self.join(self.fill(ask), clauses))

    def clause(self, name: str, entry) -> str:
        value = self.stated[name]
        choices = entry[_variant(value, entry)] if isinstance(entry, dict) else entry
        return self.fill(self.pick(choices, value), name)

    def pick(self, choices: phrases.Phrases, value=None) -> str:
        options = getattr(choices, self.split)
        # A yearly amount is said per month only where that is a whole number.
        fits = [o for o in options if "{month}" not in o or value % 12 == 0]
        return self.rng.choice(fits)

    def fill(self, phrase: str, name: str = "") -> str:
        value = self.stated.get(name)
        if "{month}" in phrase:
            return phrase.replace("{month}", self.money(value // 12))
        if "{year}" in phrase:
            return phrase.replace("{year}", self.money(value * 12))
        if "{}" in phrase:
            phrase = phrase.replace("{}", self.show(name, value))
        return re.sub(r"\{(\w+)\}", lambda found: self.show(found[1], self.stated[found[1]]), phrase)

    def show(self, name: str, value) -> str:
        """The value as people write it."""
        if name in LISTED:
            return LISTED[name](self, value)
        if name in STATE_PARAMETERS:
            return self.rng.choice([value, phrases.STATE_NAMES[value]])
        if name in CURRENCY_PARAMETERS:
            return self.pick(phrases.CURRENCIES[value])
        if name in RATIOS:
            return f"{value * 100:.6g}" + self.rng.choice(["%", "%", "%", " %", " percent"])
        if name in UNSIGNED:
            return self.money(value).replace("$", "")
        return self.money(abs(value)) if name in self.amounts else f"{value:g}"

    def money(self, value: int) -> str:
        forms = [f"${value:,}", f"${value:,}", f"{value}"]
        if value >= 1_000 and value % 100 == 0 and value < 1_000_000:
            forms += [f"${value / 1_000:g}k", f"{value / 1_000:g}k", f"{value / 1_000:g}K"]
        if value >= 1_000_000 and value % 10_000 == 0:
            forms += [f"${value / 1e6:g}M", f"{value / 1e6:g} million", f"${value / 1e6:g} million"]
        return self.rng.choice(forms)

    def join(self, ask: str, clauses: list[str]) -> str:
        style = self.rng.choice(["sentences", "sentences", "commas", "list", "notes"])
        first = self.rng.random() < 0.5
        if style == "list":
            return "\n- ".join([ask, *clauses])
        if style == "sentences":
            told = " ".join(_sentence(clause) for clause in clauses)
        else:
            told = {"commas": ", ", "notes": "; "}[style].join(clauses)
        ask = ask if ask.endswith("?") else ask + "."
        if first:
            return f"{ask} {told}"
        return f"{told} {ask}" if style == "sentences" else f"{told}. {ask}"

    def holdings(self, value: dict) -> str:
        return ", ".join(
            f"{self.show('rate', share)} {self.pick(phrases.HOLDINGS[key])}" for key, share in value.items()
        )

    def contributions(self, value: dict) -> str:
        parts = (
            f"{self.money(sum_)} into my {self.pick(phrases.ACCOUNTS[key])}" for key, sum_ in value.items()
        )
        return " and ".join(parts)

    def coverage(self, value: dict) -> str:
        parts = (
            self.pick(phrases.COVERAGES[key]).replace("{}", self.money(sum_)) for key, sum_ in value.items()
        )
        return " and ".join(parts)

    def debts(self, value: list[dict]) -> str:
        line = self.pick(phrases.DEBT_LINES)
        return "; ".join(self._debt(line, debt) for debt in value)

    def _debt(self, line: str, debt: dict) -> str:
        shown = {
            "type": self.pick(phrases.DEBT_NAMES[debt["type"]]),
            "balance": self.money(debt["balance"]),
            "rate": self.show("rate", debt["rate"]),
            "minimum": self.money(debt["minimum"]),
        }
        return line.format(**shown)


LISTED = {
    "existing_allocations": Writer.holdings,
    "retirement_contributions": Writer.contributions,
    "existing_coverage": Writer.coverage,
    "debts": Writer.debts,
}


def _variant(value, entry: dict) -> str:
    """Which entry of a phrase dict says the value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if value == 0 and "zero" in entry:
        return "zero"
    return "loss" if value < 0 else "number"


def _sentence(clause: str) -> str:
    text = clause[0].upper() + clause[1:]
    return text if text.endswith(".") else text + "."


def _singular(text: str) -> str:
    text = re.sub(
        r"\b1 (young dependent|dependent|small children|children|kid|little one|more year|year|month)s?\b",
        r"1 \1",
        text,
    )
    return text.replace("1 small children", "1 small child").replace("1 children", "1 child")


def make_row(tool: Callable, split: str, row: int, rng: random.Random) -> dict:
    """One row whose gold call gives no error."""
    while True:
        drawn = SAMPLERS[tool.__name__](Draw(rng, tool, row))
        stated = {name: value for name, value in drawn.items() if value is not UNSTATED}
        values = documented_defaults(tool) | stated
        arguments = {name: values[name] for name in inspect.signature(tool).parameters}
        answer = tool(**arguments)
        if not answer.startswith("Error:"):
            break
    question = Writer(rng, split, tool, stated).question(phrases.PHRASES[tool.__name__])
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "answer": answer,
        "tool_call": {"name": tool.__name__, "arguments": arguments},
    }


def make_rows(split: str, seed: int = SEED) -> Iterator[dict]:
    """The rows of one file, the tools shuffled among each other, no question twice."""
    rng = random.Random(f"{seed} {split}")
    rows = [make_row(tool, split, i, rng) for tool in TOOL_FUNCTIONS for i in range(ROWS_PER_TOOL[split])]
    rng.shuffle(rows)
    seen = set()
    for row in rows:
        question = row["prompt"][1]["content"]
        if question not in seen:
            seen.add(question)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent.parent / "data")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS_PER_TOOL:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(split)]
        # Bytes, so that no platform changes the line ends.
        (folder / f"financial_{split}.jsonl").write_bytes("".join(lines).encode())
        print(f"financial_{split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
