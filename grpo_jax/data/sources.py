"""Sources of rows: a file, a slice of one, Python objects, a TFDS data set or the Hugging Face hub.

Each source yields (place, row) pairs: the location of the row, for messages to the user, and its columns as JSON
values. Only `tfds:` and hub data sets need the network. TFDS, pyarrow and datasets are imported only by the
sources that need them.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import importlib
import io
import json
import lzma
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.text import nearest, shorten

Row = tuple[str, Any]
Source = str | os.PathLike | Iterable[Mapping[str, Any]]

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv")
FORMATS = (*TEXT_FORMATS, ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED = (
    f"supported are {', '.join(FORMATS)}, and {TEXT_FORMATS[0]}, {TEXT_FORMATS[1]}, {TEXT_FORMATS[2]} and "
    f"{TEXT_FORMATS[3]} compressed as {', '.join(COMPRESSIONS)}"
)
_SLICED = re.compile(r"(?P<path>.+)\[(?P<part>[^\[\]]*)\]")
_SLICE = re.compile(r"(-?[\d_.]+%?)?:(-?[\d_.]+%?)?")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?(?P<part>\[[^\[\]]*\])?")
_LOCAL = "or give the path of a local file, e.g. rows.jsonl"


def read_source(source: Source) -> Iterator[Row]:
    """The (place, row) pairs of a data set; see `load_examples` for what a source may be.

    Raises:
        FileNotFoundError: the file does not exist; names those that do.
        ValueError: the source is of no supported kind, cannot be loaded, or a line of it cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        return _given_rows(source)
    source = os.fspath(source)
    if source.startswith("tfds:"):
        return _tfds_rows(source)
    if os.path.exists(os.path.expanduser(source)):
        return _file_rows(source, None)
    sliced, hub = _SLICED.fullmatch(source), _HUB_ID.fullmatch(source)
    if sliced and os.path.exists(os.path.expanduser(sliced["path"])):
        return _file_rows(sliced["path"], sliced["part"])
    if hub and _format(hub["name"])[0] not in FORMATS:
        return _hub_rows(source, hub["name"], (hub["split"] or "train") + (hub["part"] or ""))
    path = sliced["path"] if sliced else source
    files = (*Path(path).expanduser().parent.glob("*"), *Path().glob("*/*"))
    found = {str(file) for file in files if _format(file.name)[0] in FORMATS and os.path.isfile(file)}
    near = nearest(path, sorted(found), n=3)
    hint = f"nearest: {', '.join(near)}" if near else f"there is no data set next to it; {SUPPORTED}"
    raise FileNotFoundError(f"data set {path} does not exist; {hint}")


# Files


def _file_rows(path: str, part: str | None) -> Iterator[Row]:
    """The rows of a file, or of a slice of it; lines outside the slice are not parsed."""
    file = Path(path).expanduser()
    if file.is_dir():
        if (file / "dataset_info.json").exists() or (file / "dataset_dict.json").exists():
            what = "saved by `datasets`: load it with load_from_disk and write it with to_parquet('rows.parquet')"
        else:
            files = sorted(one for one in file.iterdir() if _format(one.name)[0] in FORMATS)
            data = [one for one in files if one.name not in ("state.json", "config.json")]
            what = f"name one file in it, e.g. {data[0]}" if data else "give the path of a file"
        raise ValueError(f"{path} is a folder; {what}; {SUPPORTED}")
    kind, compression = _format(path)
    if not file.is_file() or kind not in FORMATS or (compression and kind not in TEXT_FORMATS):
        what = f"has the unknown format {file.suffix!r}" if file.is_file() else "is not a regular file"
        raise ValueError(f"data set {path} {what}; {SUPPORTED}")
    is_lines = False
    if kind == ".parquet":
        rows = _parquet_rows(path)
    else:
        text = _text(path, compression)
        if kind in (".csv", ".tsv"):
            rows = _table_rows(path, text, "\t" if kind == ".tsv" else ",")
        elif kind == ".json" and text.lstrip().startswith("["):
            try:
                array = json.loads(text, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: not JSON: {error}; write an array of objects, or one JSON object per line"
                ) from None
            rows = [(f"row {i} of {path}", row) for i, row in enumerate(array, start=1)]
        else:
            is_lines, lines = True, list(io.StringIO(text, newline=None))
            while lines and not lines[-1].strip():  # empty ones at the end
                lines.pop()
            rows = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
    if part is not None and rows:
        rows = [rows[i] for i in _chosen(path, part, len(rows))]
    for place, row in rows:
        yield place, _parsed(place, row) if is_lines else row


def _format(path: str) -> tuple[str, str | None]:
    """A file's format and its compression, by its name's suffixes in lower case."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    return suffixes[-1] if suffixes else "", compression


def _text(path: str, compression: str | None) -> str:
    """The whole text of a file, without a byte order mark."""
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression or "", open)
    if compression == ".zst":
        pyarrow = _library("pyarrow", f"{path}: .zst")
        opened = lambda file, _: pyarrow.input_stream(str(file), compression="zstd")  # noqa: E731
    try:
        with opened(Path(path).expanduser(), "rb") as stream:
            data = stream.read()
    except Exception as error:  # OSError, EOFError, LZMAError, zlib.error, which share no base
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise ValueError(
            f"{path} has the name of a text file, but its content is binary or UTF-16; {SUPPORTED}"
        )
    try:
        return data.decode("utf-8-sig")  # Windows editors put a byte order mark before the first row
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error}; save the file as UTF-8") from None


def _parsed(place: str, line: str) -> Any:
    if not line.strip():
        raise ValueError(f"{place}: empty line between rows; delete it")
    try:
        return json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}: not JSON: {error}; write one JSON object per line, got {shorten(line.strip(), 80)!r}"
        ) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _table_rows(path: str, text: str, delimiter: str) -> list[Row]:
    """The records of a CSV or TSV file, with the column names of its first line; cells are text, empty ones null."""
    csv.field_size_limit(2**31 - 1)  # Python's default, 131,072 characters, is too short for long prompts
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"{path}:1: the column {twice[0]!r} appears twice; rename one")
        place = f"{path}:{reader.line_num + 1}"
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{place}: {len(cells)} cells, the first line names {len(header)} columns; quote a cell that "
                    f"contains {delimiter!r}, and double the quotation marks in it"
                )
            if cells:
                rows.append((place, {k: v or None for k, v in zip(header, cells, strict=True)}))
            place = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return rows


def _parquet_rows(path: str) -> list[Row]:
    _library("pyarrow", f"{path}: Parquet")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(Path(path).expanduser()) as file:
            rows = file.read().to_pylist()
    except Exception as error:  # pyarrow's many errors
        raise ValueError(f"{path} cannot be read as Parquet: {_reason(error)}") from None
    return [(f"row {i} of {path}", _plain(row)) for i, row in enumerate(rows, start=1)]


def _chosen(path: str, part: str, rows: int) -> range:
    """The rows of a slice such as `:95%` or `100:200`, by TFDS's rules.

    A percentage is rounded to the nearest row, a half to the even one; one % holds for both bounds; a negative
    bound counts from the end. Bounds outside the rows and empty slices are errors.
    """
    percent = "%" in part
    try:
        if not _SLICE.fullmatch(part) or part == ":":
            raise ValueError("it is not a slice")
        number = float if percent else int
        bounds = [number(bound.rstrip("%")) if bound else None for bound in part.split(":")]
        if any(abs(bound) > (100 if percent else rows) for bound in bounds if bound is not None):
            raise ValueError(f"a bound exceeds {'100%' if percent else f'the {rows} rows'}")
        if percent:
            bounds = [None if bound is None else round(bound * rows / 100.0) for bound in bounds]
        if chosen := range(rows)[slice(*bounds)]:
            return chosen
        raise ValueError(f"it is empty for {rows} rows")
    except ValueError as error:
        raise ValueError(
            f"{path}[{part}] selects no rows: {error}; write [:95%], [95%:] or [100:200]"
        ) from None


# Python objects


def _given_rows(source: Any) -> Iterator[Row]:
    """The rows of a list of dicts or of a data set object of the `datasets` library."""
    kind = type(source).__name__
    if (
        isinstance(source, Mapping)
        and source
        and all(hasattr(split, "column_names") for split in source.values())
    ):
        splits = ", ".join(map(str, source))
        raise ValueError(
            f"the given {kind} holds the splits {splits}; give one, as data[{next(iter(source))!r}]"
        )
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise ValueError(
            f"a data set must be a path, a hub id, a list of dicts or a datasets.Dataset, got {kind}"
            + ("; put the row in a list" if isinstance(source, Mapping) else "")
        )
    to_dict = getattr(source, "to_dict", None)
    if callable(to_dict) and hasattr(source, "iterrows"):  # pandas
        source = to_dict("records")
    for i, row in enumerate(source, start=1):
        yield f"row {i} of the given {kind}", _plain(row)


def _plain(value: Any) -> Any:
    """Arrays, tensors, bytes and NaN (how pandas marks missing values) as JSON values."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # an image, say, that only a reward reads
            return value
    return None if isinstance(value, float) and math.isnan(value) else value


# TFDS and the hub


def _tfds_rows(source: str) -> Iterator[Row]:
    """The rows of a registered data set, prepared on disk; of processes that start together, the first writes it."""
    name, _, split = source.removeprefix("tfds:").partition(":")
    try:
        import filelock
        import tensorflow_datasets as tfds

        cache = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
        os.makedirs(cache, exist_ok=True)
        tfds.disable_progress_bar()
        load: Any = functools.partial(tfds.builder, name, data_dir=cache, file_format="array_record")
        with filelock.FileLock(os.path.join(cache, "grpo_jax.lock")):
            try:  # inside the lock: a builder reads what another process has written
                builder = load()
            except tfds.core.DatasetNotFoundError:
                # some builders, gsm8k among them, register only when their module is imported
                base = name.partition("/")[0]
                for init in Path(tfds.__file__).parent.glob(f"*/{base}/__init__.py"):
                    importlib.import_module(f"tensorflow_datasets.{init.parts[-3]}.{base}")
                builder = load()
            builder.download_and_prepare()
        data = builder.as_data_source(split=split or "train")
    except Exception as error:  # the builder's own download code may raise anything
        raise ValueError(f"{source} cannot be loaded: {_reason(error)}; {_LOCAL}") from error
    for i in range(len(data)):
        yield f"{source}:{i + 1}", _plain(data[i])


def _hub_rows(source: str, name: str, split: str) -> Iterator[Row]:
    datasets = _library("datasets", f"{source} is not a local file, and as a hub data set it")
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, access, format: the hub client's many errors
        raise ValueError(
            f"{source} is not a local file and cannot be loaded from the hub: {_reason(error)}; {_LOCAL}"
        ) from error
    for i, row in enumerate(data, start=1):
        yield f"{source}:{i}", _plain(row)


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f"{what} needs the `{name}` library: pip install {name}") from None


def _reason(error: Exception) -> str:
    """The first line of a library's message; the others are its advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
