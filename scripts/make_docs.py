"""Writes the generated parts of docs/: the options, the metrics, and TRL's option names that are not options here.

    python scripts/make_docs.py

A part is between the comments `<!-- generated: NAME -->` and `<!-- end -->`; tests/test_docs.py checks that it is current.
"""

from __future__ import annotations

import re
from pathlib import Path

from grpo_jax.run.config import shown
from grpo_jax.run.fields import GROUPS, OPTIONS, option_type
from grpo_jax.run.trl_options import ALIASES, EQUAL, INSTEAD, REFUSED, SETS
from grpo_jax.scoring.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {bool: "true, false", int: "integer", float: "number", str: "text", dict: "JSON object"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def options() -> str:
    """A table of each group of options."""
    lines = []
    for name, field in OPTIONS.items():
        if name in GROUPS:
            lines += ["", f"## {GROUPS[name][0].upper()}{GROUPS[name][1:]}", ""]
            lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        default = shown(field.get_default(call_default_factory=True))
        also = "".join(f" Also `{alias}`." for alias, option in ALIASES.items() if option == name)
        lines.append(f"| `{name}` | {_values(name)} | `{default}` | {field.description}{also} |")
    return "\n".join(lines[1:])


def _values(name: str) -> str:
    kind, choices, is_list, _ = option_type(name)
    text = ", ".join(f"`{choice}`" for choice in choices) or KINDS[kind]
    bounds = [(SIGNS[s], getattr(m, s)) for m in OPTIONS[name].metadata for s in SIGNS if hasattr(m, s)]
    text += "".join(f" {sign} {bound:g}" for sign, bound in bounds)
    return f"one or more: {text}" if is_list else text


def metrics() -> str:
    """A table of all metrics."""
    rows = [f"| `{name}` | {text} |" for name, text in METRICS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])


def trl_options() -> str:
    """Tables of the option names that are not options here."""
    lines = ["| name | here |", "|---|---|"]
    lines += [f"| `{name}` | `{option}` |" for name, option in ALIASES.items()]
    for name, of in SETS.items():
        lines += [f"| `{name} {str(value).lower()}` | {_pairs(options)} |" for value, options in of.items()]
    lines += [f"| `{name}` | must equal `{option}`: {text} |" for name, (option, text) in EQUAL.items()]
    lines += ["", "A warning names what takes the place of these; they change no result:", ""]
    lines += ["| name | what takes its place |", "|---|---|", *_by_text(INSTEAD)]
    lines += [
        "",
        "These are errors, except for null and for values that ask for what happens here anyway:",
        "",
    ]
    reasons = {name: text for name, (_, text) in REFUSED.items()}
    return "\n".join([*lines, "| name | reason |", "|---|---|", *_by_text(reasons)])


def _pairs(options: dict) -> str:
    return ", ".join(f"`{name} {value}`" for name, value in options.items())


def _by_text(texts: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(f"`{name}`")
    return [f"| {', '.join(of)} | {text} |" for text, of in names.items()]


PARTS = {"options.md": options, "metrics.md": metrics, "trl.md": trl_options}


def rendered(name: str) -> str:
    """A page with its generated part made anew."""
    begin, end = f"<!-- generated: {PARTS[name].__name__} -->\n", "<!-- end -->"
    text = (DOCS / name).read_text(encoding="utf-8")
    part = f"{begin}\n{PARTS[name]()}\n\n{end}"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: part, text, count=1, flags=re.S)


if __name__ == "__main__":
    for page in PARTS:
        (DOCS / page).write_text(rendered(page), encoding="utf-8")
