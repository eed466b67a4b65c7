"""Makes data/math_train.jsonl and data/math_test.jsonl: sums and products asked in words.

    python scripts/make_math_data.py

The same bytes come out every time. Numbers run from 10 to 99. An unordered pair of numbers belongs to one of the two files, so the
test asks for numbers that training never put together. No question occurs twice in a file.
"""

import argparse
import json
import random
from pathlib import Path

from tools_funcs.math_tools import add, multiply

SEED = 20261101
ROWS = {"math_train.jsonl": 6000, "math_test.jsonl": 600}
TEST_SHARE = 0.15  # of the 4,095 unordered pairs of numbers

PHRASINGS = {
    add: (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "Compute {a} + {b}.",
        "Calculate {a} plus {b}.",
        "Sum {a} and {b}.",
    ),
    multiply: (
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "Compute {a} * {b}.",
        "Calculate {a} times {b}.",
        "Product of {a} and {b}?",
    ),
}


def is_test_pair(a: int, b: int) -> bool:
    """The unordered pair belongs to the test file; depends on the two numbers alone."""
    return random.Random(f"{SEED} {min(a, b)} {max(a, b)}").random() < TEST_SHARE


def draw_pair(rng: random.Random, from_test: bool) -> tuple[int, int]:
    """Two numbers from 10 to 99 that belong to the file."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if is_test_pair(a, b) == from_test:
            return a, b


def draw_row(rng: random.Random, a: int, b: int) -> dict:
    """A row that asks for the sum or the product of two numbers."""
    tool = rng.choice((add, multiply))
    prompt = rng.choice(PHRASINGS[tool]).format(a=a, b=b)
    call = {"name": tool.__name__, "arguments": {"a": a, "b": b}}
    return {"prompt": prompt, "answer": tool(a, b), "tool_call": call}


def make_rows(name: str) -> list[dict]:
    """The rows of one of the two files."""
    rng = random.Random(f"{SEED} {name}")
    rows: dict[str, dict] = {}  # by question, so that none occurs twice
    while len(rows) < ROWS[name]:
        a, b = draw_pair(rng, from_test=name == "math_test.jsonl")
        row = draw_row(rng, a, b)
        while row["prompt"] in rows:
            row = draw_row(rng, a, b)
        rows[row["prompt"]] = row
    return list(rows.values())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Make the data of the quickstart.")
    default = Path(__file__).resolve().parents[1] / "data"
    parser.add_argument("--output_dir", type=Path, default=default, help="folder of the two files")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        lines = "".join(json.dumps(row) + "\n" for row in make_rows(name))
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
