"""Reads what a docstring says about a function and its arguments.

Four styles: Google (`name: text`), Google with types (`name (int): text`), NumPy (`name : int` and an
indented text under a header with dashes), Sphinx (`:param name: text`).
"""

from __future__ import annotations

import dataclasses
import json
import re

_ARGUMENT_TITLES = (
    "Args",
    "Arguments",
    "Parameters",
    "Keyword Args",
    "Keyword Arguments",
    "Other Parameters",
)
_GOOGLE_HEADER = re.compile(rf"^\s*({'|'.join(_ARGUMENT_TITLES)}|Returns|Raises):\s*$")
# Other underlined titles are part of the description.
_NUMPY_HEADER = re.compile(
    r"^\s*(Parameters|Other Parameters|Returns|Yields|Receives|Raises|Warns|Warnings|See Also|Notes|References|"
    r"Examples?|Attributes|Methods):?\s*$"
)
_DASHES = re.compile(r"^\s*-{3,}\s*$")
_GOOGLE_ENTRY = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\(.*?\))?\s*:\s*(.*)$")
_NUMPY_ENTRY = re.compile(r"^(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?$")
_SPHINX_ENTRY = re.compile(r"^:(\w+)\s*([^:]*):\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_SPHINX_ARGUMENTS = ("param", "parameter", "arg", "argument", "key", "keyword")
_SPHINX_RETURNS = ("return", "returns")


@dataclasses.dataclass(frozen=True)
class Docstring:
    """What a docstring says.

    Args:
        description: the text before the first section.
        arguments: argument name → its text on one line.
        returns: the text of the Returns section, None when there is none.
    """

    description: str
    arguments: dict[str, str]
    returns: str | None


def read_docstring(doc: str) -> Docstring:
    """Split a docstring, as `inspect.getdoc` returns it, into description, arguments and returns."""
    description, arguments, returns = [], {}, None
    for title, numpy, lines in _sections(doc.strip().split("\n")):
        if title is None:
            description, arguments, returns = _sphinx_entries(lines)
        elif title in _ARGUMENT_TITLES:
            arguments |= _numpy_entries(lines) if numpy else _google_entries(lines)
        elif title == "Returns":
            returns = _numpy_returns(lines) if numpy else "\n".join(lines).strip()
    return Docstring("\n".join(description).strip(), arguments, returns)


def split_choices(text: str) -> tuple[str, list | None]:
    """Take a closing `(choices: ["a", "b"])` off an argument's text; None when there is none."""
    match = _CHOICES.search(text)
    if not match:
        return text, None
    try:
        choices = json.loads(match.group(1))
    except ValueError:
        return text, None
    if not isinstance(choices, list):
        return text, None
    return text[: match.start()].strip(), [c.strip() if isinstance(c, str) else c for c in choices]


def _sections(lines: list[str]):
    """Yield (title or None, is NumPy style, lines) for each section in order."""
    title, numpy, body = None, False, []
    skip = False
    for i, line in enumerate(lines):
        if skip:
            skip = False
            continue
        google = _GOOGLE_HEADER.match(line)
        dashed = i + 1 < len(lines) and _DASHES.match(lines[i + 1]) and _NUMPY_HEADER.match(line)
        if google or dashed:
            yield title, numpy, body
            title, numpy, body = (dashed or google).group(1), bool(dashed), []
            skip = numpy
        else:
            body.append(line)
    yield title, numpy, body


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _google_entries(lines: list[str]) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    margin, name = None, None
    for line in filter(str.strip, lines):
        margin = _indent(line) if margin is None else margin
        entry = _GOOGLE_ENTRY.match(line) if _indent(line) <= margin else None
        if entry:
            name = entry.group(1)
            entries[name] = [entry.group(2)]
        elif name:
            entries[name].append(line)
    return {name: _one_line(parts) for name, parts in entries.items()}


def _numpy_entries(lines: list[str]) -> dict[str, str]:
    entries: dict[str, list[str]] = {}
    names: list[str] = []
    for line in filter(str.strip, lines):
        entry = _NUMPY_ENTRY.match(line.strip()) if _indent(line) == 0 else None
        if entry:
            names = [n.strip() for n in entry.group(1).split(",")]
            entries |= {n: [] for n in names}
        else:
            for n in names:
                entries[n].append(line)
    return {name: _one_line(parts) for name, parts in entries.items() if parts}


def _numpy_returns(lines: list[str]) -> str:
    """The indented text without the type above it; a text that is not indented as it is."""
    return _one_line([line for line in lines if _indent(line)] or lines)


def _sphinx_entries(lines: list[str]) -> tuple[list[str], dict[str, str], str | None]:
    """Take the fields `:param name: text`, `:returns: text` and what else begins so off the description."""
    description: list[str] = []
    entries: list[tuple[str, str, list[str]]] = []  # (kind of field, name, text)
    for line in lines:
        if entry := _SPHINX_ENTRY.match(line):
            entries.append((entry[1], entry[2].strip().rpartition(" ")[2], [entry[3]]))
        elif entries:
            entries[-1][2].append(line)
        else:
            description.append(line)
    arguments = {name: _one_line(text) for kind, name, text in entries if kind in _SPHINX_ARGUMENTS}
    returns = [_one_line(text) for kind, _, text in entries if kind in _SPHINX_RETURNS]
    return description, arguments, returns[0] if returns else None


def _one_line(parts: list[str]) -> str:
    return " ".join(part.strip() for part in parts).strip()
