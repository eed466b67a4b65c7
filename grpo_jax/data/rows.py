"""Reads rows, checks them, and draws batches from them in an order that can be resumed.

A source is a JSONL file (`data/train.jsonl`), a slice of one (`data/train.jsonl[:95%]`,
through TFDS's array_record cache), a TFDS data set (`tfds:gsm8k:train[:1000]`) or a data
set of the Hugging Face hub (`owner/name`). Only the last two need the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.data.messages import read_prompt, show_json
from grpo_jax.types import Example, ToolCall

# Keywords that every reward gets from the trainer; a column of that name would hide one.
RESERVED_COLUMNS = frozenset(
    ("completions", "prompts", "completion_ids", "trainer_state", "log_metric", "log_extra")
)
_SLICED_FILE = re.compile(r"(?P<path>.+\.jsonl?)\[(?P<part>[^\[\]]*)\]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # alone, it can be written to no file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_examples(
    source: str, *, system_prompt: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Read and check every row of a data set.

    Blank lines at the end of a JSONL file are ignored; a blank line between rows is an error.

    Args:
        source: a JSONL path, `path.jsonl[slice]`, `tfds:name[/config][:split]` or `owner/name`.
        system_prompt: system message for the rows that do not start with one; None adds nothing.
        columns: our column → the data set's, e.g. {"prompt": "question"}; None renames nothing.

    Returns:
        The rows in the source's order, at least one.

    Raises:
        FileNotFoundError: the file does not exist; names those that do.
        ValueError: a row is not usable (says file, line, reason and mend), there are no rows, or a
            data set cannot be loaded.
    """
    examples = []
    for place, row in _rows(source):
        try:
            examples.append(_example(row, place, system_prompt, columns or {}))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not examples:
        raise ValueError(
            f'{source} holds no rows; write one JSON object a line: {{"prompt": "…", "answer": "…"}}'
        )
    return examples


def row_tools(example: Example, names: Iterable[str]) -> list[str]:
    """The tools that a row may see: those that its column `tools` names, or all.

    Args:
        example: the row; null in the column means all, as does its absence.
        names: of all tools.

    Returns:
        The names, in the order of `names`.

    Raises:
        ValueError: the column is not a list of at least one tool's name.
    """
    names, wanted = list(names), example.extra.get("tools")
    if wanted is None:
        return names
    if not isinstance(wanted, list) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise ValueError(
            f"{example.source}: column 'tools' must be a list of tool names, as {show_json(names[:1])}, or null "
            f"for all, got {show_json(wanted)}"
        )
    for name in wanted:
        if name not in names:
            (near,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ValueError(f"{example.source}: column 'tools': unknown tool {name!r}; nearest: {near}")
    return [name for name in names if name in wanted]


def gold_calls(example: Example, functions: Mapping[str, Callable] | None) -> list[ToolCall]:
    """The calls that answer a row, from its column `tool_call`, else from `ground_truth`.

    `tool_call` is taken as it is. `ground_truth` is padded with nulls to the parameters of all
    tools: keys that the function does not have are dropped, null stays for its own, nulls inside
    nested objects are dropped, and integral floats become int.

    Args:
        example: the row.
        functions: tool name → function, whose signature tells its own parameters; None, when they
            are not at hand, takes every top-level null of `ground_truth` for padding.

    Returns:
        The calls in order; empty for a row that has neither column, or null in it.

    Raises:
        ValueError: a call is not {"name": text, "arguments": object}, or names an unknown tool or one
            that the row does not see.
    """
    column = "ground_truth" if example.extra.get("tool_call") is None else "tool_call"
    value = example.extra.get(column)
    calls = [] if value is None else value if isinstance(value, list) else [value]
    try:
        gold = [_gold_call(call, functions, padded=column == "ground_truth") for call in calls]
    except ValueError as error:
        raise ValueError(f"{example.source}: column {column!r}: {error}") from None
    seen = None if functions is None else row_tools(example, functions)
    for call in gold:
        if seen is not None and call.name not in seen:
            raise ValueError(
                f"{example.source}: column {column!r}: the row does not see the tool {call.name!r}, only "
                f"{', '.join(seen)}; add it to the column 'tools'"
            )
    return gold


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of 0 … n − 1 that depends on nothing else.

    Args:
        seed: of the run, >= 0.
        epoch: counted from 0.
        n: number of rows.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the next batch starts; part of a checkpoint.

    Args:
        epoch: counted from 0, also the number of finished epochs.
        next_index: place in the epoch's order.
    """

    epoch: int = 0
    next_index: int = 0

    def to_json(self) -> dict[str, int]:
        """The cursor as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> Cursor:
        """The inverse of `to_json`."""
        return cls(epoch=int(value["epoch"]), next_index=int(value["next_index"]))


def next_batch(n: int, size: int, cursor: Cursor, seed: int) -> tuple[list[tuple[int, int]], Cursor]:
    """Draw the next batch of rows; an incomplete last batch of an epoch is dropped.

    Args:
        n: number of rows.
        size: rows per batch.
        cursor: where the last batch ended.
        seed: of the run.

    Returns:
        [size] pairs (example_index, draw_index) and the next cursor, which is at the next epoch's
        start as soon as this epoch has no full batch left. draw_index = epoch · n + place in the
        epoch is the key of the row's randomness.

    Raises:
        ValueError: size is not in 1 … n.
    """
    if not 1 <= size <= n:
        raise ValueError(
            f"a batch must hold between 1 prompt and the data set's {n} rows, got {size}; "
            "lower the batch size or add rows"
        )
    if cursor.next_index + size > n:  # a cursor that was saved with a smaller batch
        cursor = Cursor(cursor.epoch + 1, 0)
    order = epoch_order(seed, cursor.epoch, n)
    stop = cursor.next_index + size
    draws = [(int(order[place]), cursor.epoch * n + place) for place in range(cursor.next_index, stop)]
    return draws, Cursor(cursor.epoch, stop) if stop + size <= n else Cursor(cursor.epoch + 1, 0)


# Sources: (place, row as parsed JSON) pairs


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    sliced = _SLICED_FILE.fullmatch(source)
    if source.startswith("tfds:"):
        return _tfds_rows(source)
    if Path(source).expanduser().is_file():
        return _parsed(source, _lines(source))
    if sliced:
        return _parsed(sliced["path"], _sliced_lines(sliced["path"], sliced["part"]))
    if _HUB_ID.fullmatch(source) and Path(source).suffix not in (".json", ".jsonl"):
        return _hub_rows(source)
    raise _not_found(source)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number, line) pairs without the blank lines at the end."""
    number, blank = 0, []
    try:
        # utf-8-sig: Windows editors put a byte order mark before the first row.
        with Path(path).expanduser().open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                blank.append((number, line))
                if line.strip():
                    yield from blank
                    blank = []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 after line {number}: {error}; save it as UTF-8") from None


def _sliced_lines(path: str, part: str) -> Iterator[tuple[int, str]]:
    """The lines of a slice, `:95%` or `100:200`, by TFDS's rules for it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise _not_found(path)
    if next(_lines(path), None) is None:
        return
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    with contextlib.redirect_stdout(None):  # TFDS announces a download; there is none
        builder = _prepared(lambda: _line_builder(path, digest))
    try:
        data = builder.as_data_source(split=f"train[{part}]")
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{path}[{part}] selects no rows: {_reason(error)}; write [:95%], [95%:] or [100:200]"
        ) from None
    for i in range(len(data)):
        yield int(data[i]["number"]), data[i]["line"].decode()


def _line_builder(path: str, digest: str) -> Any:
    """A TFDS builder over the raw lines of a file, cached under the file's digest."""
    import tensorflow_datasets as tfds

    class JsonlLines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Raw lines with their numbers."""

        VERSION = tfds.core.Version("1.0.0")
        name = f"jsonl_{digest}"

        def _info(self):
            features = tfds.features.FeaturesDict({"number": np.int64, "line": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, line in _lines(path):
                yield number, {"number": number, "line": line}

    return JsonlLines(data_dir=_cache_root(), file_format="array_record")


def _cache_root() -> str:
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _prepared(make_builder: Callable[[], Any]) -> Any:
    """A builder whose cache is on disk; of processes that start together, the first writes it."""
    import filelock
    import tensorflow_datasets as tfds

    os.makedirs(_cache_root(), exist_ok=True)
    tfds.disable_progress_bar()
    with filelock.FileLock(os.path.join(_cache_root(), "grpo_jax.lock")):
        builder = make_builder()  # inside the lock: it reads what another process has written
        builder.download_and_prepare()
    return builder


def _tfds_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, _, split = source.removeprefix("tfds:").partition(":")
    try:
        builder = _prepared(lambda: _registered_builder(name))
        data = builder.as_data_source(split=split or "train")
    except Exception as error:  # whatever the builder's own download code raises
        raise ValueError(f"{source} cannot be loaded: {_reason(error)}; {_LOCAL}") from error
    for i in range(len(data)):
        yield f"{source}:{i + 1}", _plain(data[i])


def _registered_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    load = functools.partial(tfds.builder, name, data_dir=_cache_root(), file_format="array_record")
    try:
        return load()
    except tfds.core.DatasetNotFoundError:
        # Some builders, gsm8k among them, register only when their module is imported.
        base = name.partition("/")[0]
        for init in Path(tfds.__file__).parent.glob(f"*/{base}/__init__.py"):
            importlib.import_module(f"tensorflow_datasets.{init.parts[-3]}.{base}")
        return load()


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"{source} is no file here, and as a hub data set it needs the `datasets` library: "
            f"pip install datasets; {_LOCAL}"
        ) from None
    try:
        data = datasets.load_dataset(source, split="train")
    except Exception as error:  # network, access, format: the hub client's many errors
        raise ValueError(
            f"{source} is no file here and cannot be loaded from the hub: {_reason(error)}; {_LOCAL}"
        ) from error
    for i, row in enumerate(data, start=1):
        yield f"{source}:{i}", dict(row)


def _reason(error: Exception) -> str:
    """The first line of a library's message; the others are its advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_LOCAL = "or give the path of a local .jsonl file"


def _plain(value: Any) -> Any:
    """TFDS's bytes and arrays as the JSON types that a JSONL row would hold."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.decode() if isinstance(value, bytes) else value


def _parsed(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        place = f"{path}:{number}"
        if not line.strip():
            raise ValueError(f"{place}: empty line between rows; delete it")
        try:
            row = json.loads(line, parse_constant=_no_constant)
            if "\\u" in line and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
                raise ValueError("a string holds half of a surrogate pair")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: not JSON: {error}; write one JSON object a line, got {line.strip()[:80]!r}"
            ) from None
        yield place, row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _not_found(path: str) -> FileNotFoundError:
    found = {
        str(file) for file in (*Path(path).expanduser().parent.glob("*.jsonl"), *Path().glob("*/*.jsonl"))
    }
    near = difflib.get_close_matches(path, sorted(found), n=3, cutoff=0.0)
    hint = f"nearest: {', '.join(near)}" if near else "there is no .jsonl file beside it"
    return FileNotFoundError(f"data set {path} does not exist; {hint}")


# Rows


def _example(row: Any, place: str, system_prompt: str | None, columns: Mapping[str, str]) -> Example:
    if not isinstance(row, dict):
        raise ValueError(
            f'a row must be a JSON object like {{"prompt": "…", "answer": "…"}}, got {show_json(row)}'
        )
    row = _renamed(row, columns)
    for name in ("prompt", "answer"):
        if name not in row:
            raise ValueError(f"lacks the column {name!r}; it has {', '.join(map(repr, row)) or 'none'}")
    if reserved := sorted(RESERVED_COLUMNS & set(row)):
        raise ValueError(f"column {reserved[0]!r} is a keyword that rewards get from the trainer; rename it")
    answer = row.pop("answer")
    if not isinstance(answer, str):
        raise ValueError(f"'answer' must be text, as the tool returns it, got {show_json(answer)}; quote it")
    messages = read_prompt(row.pop("prompt"))
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return Example(messages, answer, row, place)


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if absent := [theirs for theirs in columns.values() if theirs not in row]:
        raise ValueError(f"lacks the column {absent[0]!r} of the mapping; it has {', '.join(map(repr, row))}")
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


# Gold calls


def _gold_call(call: Any, functions: Mapping[str, Callable] | None, *, padded: bool) -> ToolCall:
    shaped = isinstance(call, dict) and isinstance(call.get("name"), str)
    if not shaped or not isinstance(call.get("arguments"), dict):
        raise ValueError(f'a call must be {{"name": text, "arguments": object}}, got {show_json(call)}')
    name, arguments = call["name"], call["arguments"]
    if functions is not None and name not in functions:
        raise ValueError(f"unknown tool {name!r}; the tools are {', '.join(functions)}")
    if padded:
        own = {key for key, value in arguments.items() if value is not None}
        if functions is not None:
            own = _own_parameters(functions[name], arguments)
        arguments = {key: _unpadded(value) for key, value in arguments.items() if key in own}
    return ToolCall(name, arguments)


def _own_parameters(function: Callable, arguments: Mapping[str, Any]) -> set[str]:
    parameters = inspect.signature(function).parameters
    own = {key for key in arguments if key in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        own |= {key for key, value in arguments.items() if value is not None}
    return own


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_unpadded(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
