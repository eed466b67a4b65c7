"""Sources: files in all formats, slices, Python objects, TFDS and the hub."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import types

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.rows import load_examples
from grpo_jax.types import Example

GOOD = '{"prompt": "What is 15 plus 27?", "answer": "Sum: 42"}'


@pytest.fixture(scope="module", autouse=True)
def tfds_cache(tmp_path_factory):
    """TFDS must not write into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


# Files


def test_byte_order_mark_windows_line_ends_and_blank_lines_at_the_end_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n\r\n  \n".encode())
    assert [e.source for e in load_examples(str(path))] == [f"{path}:1", f"{path}:2"]


def test_a_line_separator_inside_a_string_does_not_end_the_row(rows_file):
    (example,) = load_examples(rows_file('{"prompt": "a\u2028b", "answer": "x\x85"}'))
    assert (example.messages[0]["content"], example.answer) == ("a\u2028b", "x\x85")


def test_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "answer": "x"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8: .*; save the file as UTF-8"):
        load_examples(str(path))


@pytest.mark.parametrize("part", ["", "[:50%]"])
def test_a_file_without_rows_is_an_error(rows_file, part):
    with pytest.raises(ValueError, match=r"rows\.jsonl.* contains no rows; a row is an object like"):
        load_examples(rows_file("", "") + part)


@pytest.mark.parametrize("part", ["", "[:50%]"])
def test_a_missing_file_names_the_nearest_one(rows_file, part):
    path = rows_file(GOOD)
    with pytest.raises(FileNotFoundError, match=rf"row\.jsonl does not exist; nearest: {path}"):
        load_examples(path.replace("rows", "row") + part)


def test_a_missing_file_with_nothing_near_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"data set rows does not exist; there is no data set next to it"
    ):
        load_examples("rows")


@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(min_size=1).filter(str.strip), "answer": st.text()},
            optional={"more": st.recursive(st.none() | st.integers() | st.text(), st.lists)},
        ),
        min_size=1,
    ),
    st.booleans(),
)
def test_what_json_writes_is_read_back(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    for i, (row, example) in enumerate(zip(rows, load_examples(str(path)), strict=True), start=1):
        assert example.messages == [{"role": "user", "content": row["prompt"]}]
        assert {"answer": example.answer, **example.extra, "prompt": row["prompt"]} == row
        assert example.source == f"{path}:{i}"


ROWS = [
    {"prompt": "What is 15 plus 27?", "answer": "Sum: 42", "note": None},
    {"prompt": 'Say "é", then\nstop.', "answer": "é", "note": "a, b"},
]
MESSAGES = [{"role": "user", "content": ROWS[1]["prompt"]}]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8-sig")


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


ARRAY = json.dumps(ROWS, indent=2).encode()
FILES = {
    "rows.jsonl": (lines(ROWS), "{path}:2"),
    "rows.JSONL.gz": (gzip.compress(lines(ROWS), mtime=0), "{path}:2"),
    "rows.jsonl.bz2": (bz2.compress(lines(ROWS)), "{path}:2"),
    "rows.jsonl.xz": (lzma.compress(lines(ROWS)), "{path}:2"),
    "rows.json": (ARRAY, "row 2 of {path}"),
    "lines.json": (lines(ROWS), "{path}:2"),
    "rows.json.gz": (gzip.compress(ARRAY, mtime=0), "row 2 of {path}"),
    "rows.csv": (table(ROWS, ","), "{path}:3"),
    "rows.tsv": (table(ROWS, "\t"), "{path}:3"),
    "rows.v2.csv.gz": (gzip.compress(table(ROWS, ","), mtime=0), "{path}:3"),
}


@pytest.mark.parametrize("name", FILES)
def test_all_text_formats_give_the_same_rows_and_slices(tmp_path, name):
    data, place = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    second = Example(MESSAGES, "é", {"note": "a, b"}, place.format(path=path))
    assert load_examples(path)[1] == second
    assert load_examples(f"{path}[50%:]") == [second]
    assert load_examples(path)[0].extra == {"note": None}


def test_parquet_and_zstandard_give_the_same_rows_and_slices(tmp_path):
    for name, data in (("rows.parquet", parquet(ROWS)), ("rows.jsonl.zst", zstd(lines(ROWS)))):
        path = tmp_path / name
        path.write_bytes(data)
        (second,) = load_examples(f"{path}[1:]")
        assert (second.messages, second.answer, second.extra) == (MESSAGES, "é", {"note": "a, b"})
        assert len(load_examples(path)) == 2


def test_parquet_has_nested_columns_bytes_and_numbers(tmp_path):
    path = tmp_path / "rows.parquet"
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    row = {
        "prompt": MESSAGES,
        "answer": 42,
        "tool_call": call,
        "raw": b"text",
        "image": b"\xff",
        "x": float("nan"),
    }
    path.write_bytes(parquet([row]))
    (example,) = load_examples(path)
    assert (example.messages, example.answer, example.source) == (MESSAGES, "42", f"row 1 of {path}")
    assert example.extra == {"tool_call": call, "raw": "text", "image": b"\xff", "x": None}


def test_a_csv_cell_may_be_longer_than_pythons_limit(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(table([{"prompt": "x" * 200_000, "answer": "a"}], ","))
    assert len(load_examples(path)[0].messages[0]["content"]) == 200_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "rows.txt",
            lines(ROWS),
            "has the unknown format '.txt'; supported are .jsonl, .json, .csv, .tsv, .parquet, and",
        ),
        ("rows", lines(ROWS), "has the unknown format ''; supported are"),
        ("rows.parquet.gz", b"", "has the unknown format '.gz'; supported are"),
        (
            "rows.jsonl",
            b"PAR1\0\0",
            "has the name of a text file, but its content is binary or UTF-16; supported are .jsonl",
        ),
        (
            "rows.jsonl",
            gzip.compress(lines(ROWS), mtime=0),
            "has the name of a text file, but its content is binary or UTF-16; supported are",
        ),
        ("rows.csv", "prompt,answer\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("rows.csv", b"prompt,answer\na,caf\xe9\n", ":2: not UTF-8: .*; save the file as UTF-8"),
        ("rows.jsonl.gz", lines(ROWS), "cannot be read: Not a gzipped file"),
        (
            "rows.jsonl.gz",
            gzip.compress(lines(ROWS), mtime=0)[:40],
            "cannot be read: Compressed file ended before",
        ),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:12] + b"xxxxxxxxxxxxxx", "cannot be read: "),
        ("rows.jsonl.bz2", lines(ROWS), "cannot be read: "),
        ("rows.jsonl.xz", lines(ROWS), "cannot be read: "),
        ("rows.jsonl.zst", lines(ROWS), "cannot be read: "),
        ("rows.jsonl.zst", zstd(lines(ROWS))[:20], "cannot be read: "),
        ("rows.parquet", lines(ROWS), "cannot be read as Parquet: "),
        ("rows.parquet", b"", "cannot be read as Parquet: "),
        ("rows.jsonl", b"", "contains no rows; a row is an object like"),
        ("rows.json", b"[]", "contains no rows; a row is an object like"),
        ("rows.csv", b"", "contains no rows; a row is an object like"),
        ("rows.csv", b"prompt,answer\n", "contains no rows; a row is an object like"),
        (
            "rows.json",
            b'[{"prompt": "a"}',
            ": not JSON: .*; write an array of objects, or one JSON object per line",
        ),
        ("rows.json", b'[{"prompt": NaN}]', ": not JSON: NaN is not JSON; write null or a number"),
        ("rows.csv", b"prompt,prompt\na,b\n", ":1: the column 'prompt' appears twice"),
        (
            "rows.csv",
            b'prompt,answer\n"a\nb",c\nd,e,f\n',
            ":4: 3 cells, the first line names 2 columns; quote a cell",
        ),
        ("rows.csv", b'prompt,answer\n"a"b,c\n', ":2: not CSV: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        load_examples(path)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_is_an_error_that_says_what_to_name(tmp_path):
    for path in (tmp_path, f"{tmp_path}[:50%]"):
        with pytest.raises(ValueError, match=r"is a folder; give the path of a file; supported are \.jsonl"):
            load_examples(path)
    (tmp_path / "b.csv.gz").touch()
    with pytest.raises(
        ValueError, match=rf"is a folder; name one file in it, e\.g\. {tmp_path}/b\.csv\.gz; supp"
    ):
        load_examples(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(ValueError, match=r"saved by `datasets`: load it with load_from_disk and write it"):
        load_examples(tmp_path)


def test_a_file_that_may_not_be_read_or_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl is not a regular file; supported are"):
        load_examples(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.zst"])
def test_a_format_whose_library_is_missing_says_how_to_install_it(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/{name}: \S+ needs the `pyarrow` library: pip install pyarrow$"
    ):
        load_examples(tmp_path / name)


# Slices


def numbered(count: int) -> list[str]:
    return [f'{{"prompt": "question {i} ü\\u2028", "answer": "{i}"}}' for i in range(count)]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (":95%", range(0, 38)),
        ("95%:", range(38, 40)),
        ("3:7", range(3, 7)),
        ("-2:", range(38, 40)),
        ("10:50%", range(4, 20)),  # one % holds for both bounds
        (":1_0", range(10)),
        (":31.25%", range(12)),  # 12.5 rows: a half goes to the even number
        ("31.25%:33.75%", range(12, 14)),  # 13.5 rows
        ("-3.75%:", range(38, 40)),  # -1.5 rows
        ("-40:-38", range(2)),
    ],
)
def test_a_slice_holds_the_rows_of_the_whole_file_with_their_lines(rows_file, part, expected):
    path = rows_file(*numbered(40))
    whole = load_examples(path)
    sliced = load_examples(f"{path}[{part}]")
    assert sliced == [whole[i] for i in expected]


def test_columns_of_a_slice_can_be_mapped(rows_file):
    path = rows_file(*(line.replace("prompt", "q") for line in numbered(4)))
    examples = load_examples(f"{path}[2:]", columns={"prompt": "q"})
    assert [e.messages[0]["content"] for e in examples] == ["question 2 ü\u2028", "question 3 ü\u2028"]
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:3: has no column 'x', which dataset_columns names; it has 'q', 'an"
    ):
        load_examples(f"{path}[2:]", columns={"prompt": "x"})


def test_a_slice_sees_a_changed_file(rows_file):
    assert load_examples(rows_file(*numbered(4)) + "[:50%]")[-1].answer == "1"
    assert load_examples(rows_file(*numbered(8)) + "[:50%]")[-1].answer == "3"


def test_a_bad_row_of_a_slice_is_named_by_its_line(rows_file):
    path = rows_file(*numbered(9), "{}")
    assert len(load_examples(f"{path}[:9]")) == 9
    with pytest.raises(ValueError, match=r"rows\.jsonl:10: has no column 'prompt'"):
        load_examples(f"{path}[5:]")


@pytest.mark.parametrize(
    "part", ["many", ":", "5", ":0%", "3:3", "7:3", ":41", "-41:", ":101%", "1.5:", ":1.2.3%", "::2"]
)
def test_a_slice_without_rows_or_sense_is_an_error(rows_file, part):
    path = rows_file(*numbered(40))
    with pytest.raises(ValueError, match=r"selects no rows: .*; write \[:95%\], \[95%:\] or \[100:200\]"):
        load_examples(f"{path}[{part}]")


def test_files_and_slices_are_read_without_tfds_jax_and_numpy(rows_file):
    path = rows_file(GOOD, GOOD)
    code = (
        "import sys; import grpo_jax.types\n"
        "for name in [*sys.modules]:\n"
        "    if name.partition('.')[0] in ('jax', 'numpy'): del sys.modules[name]\n"
        "sys.modules |= dict.fromkeys(['jax', 'numpy', 'tensorflow_datasets', 'transformers', 'pyarrow'])\n"
        "from grpo_jax.data import gold, rows, sources\n"
        f"print(len(rows.load_examples('{path}')), len(rows.load_examples('{path}[:50%]')))"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"2 1\n"


# Python objects


def test_a_list_of_dicts_is_read_as_its_lines_would_be(rows_file):
    given = [
        json.loads(GOOD),
        {"prompt": ({"role": "user", "content": "Hi"},), "answer": np.int64(4), "x": np.ones(2)},
    ]
    first, second = load_examples(given, system_prompt="Be brief.")
    assert (first.messages, first.answer) == (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 15 plus 27?"}],
        "Sum: 42",
    )
    assert (second.messages[1:], second.answer) == ([{"role": "user", "content": "Hi"}], "4")
    assert (second.extra, second.source) == ({"x": [1.0, 1.0]}, "row 2 of the given list")
    assert given[0] == json.loads(GOOD)  # what was given is not changed


class Dataset:
    """What is needed of a datasets.Dataset, which is not imported."""

    column_names = ("prompt", "answer")

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_data_set_object_is_read_by_what_it_can_do():
    (example,) = load_examples(Dataset([{"q": "Hi", "answer": "x"}]), columns={"prompt": "q"})
    assert example == Example([{"role": "user", "content": "Hi"}], "x", {}, "row 1 of the given Dataset")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [json.loads(GOOD), {"prompt": "a"}],
            "row 2 of the given list: has no column 'answer'; it has 'prompt'",
        ),
        ([json.loads(GOOD), "rows.jsonl"], "row 2 of the given list: a row must be a JSON object"),
        (
            [{"prompt": "\ud83d", "answer": "x"}],
            "row 1 of the given list: a string contains half of a surrogate",
        ),
        ([], "the given list contains no rows; a row is an object like"),
        ({"prompt": "a", "answer": "b"}, "got dict; put the row in a list"),
        (
            {"train": Dataset([]), "test": Dataset([])},
            r"holds the splits train, test; give one, as data\['train'\]",
        ),
        (None, "a data set must be a path, a hub id, a list of dicts or a datasets.Dataset, got NoneType"),
        (3, "a data set must be a path, .*, got int"),
    ],
)
def test_given_rows_that_are_none_are_named_by_place(given, message):
    with pytest.raises(ValueError, match=message):
        load_examples(given)


# TFDS and the hub


def test_a_registered_tfds_data_set_is_read_with_config_split_and_mapping():
    import tensorflow_datasets as tfds

    class LittleQuiz(tfds.core.GeneratorBasedBuilder):
        """Three questions per level."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n) for n in ("easy", "hard")]  # noqa: RUF012

        def _info(self):
            text = tfds.features.Text()
            features = {
                "question": text,
                "answer": text,
                "marks": np.int64,
                "names": tfds.features.Sequence(text),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, split):
            for i in range(3):
                question = f"{self.builder_config.name} {split} ü {i}"
                yield i, {"question": question, "answer": str(i), "marks": i, "names": ["add"]}

    columns = {"prompt": "question", "tools": "names"}
    examples = load_examples("tfds:little_quiz/hard:test[1:]", columns=columns)
    assert examples == [
        Example(
            [{"role": "user", "content": f"hard test ü {i}"}],
            str(i),
            {"marks": i, "tools": ["add"]},
            f"tfds:little_quiz/hard:test[1:]:{i}",
        )
        for i in (1, 2)
    ]
    assert len(load_examples("tfds:little_quiz", columns={"prompt": "question"})) == 3
    with pytest.raises(ValueError, match=r"little_quiz:dev cannot be loaded: .*of a local file"):
        load_examples("tfds:little_quiz:dev")


def test_an_unknown_tfds_data_set_is_an_error():
    with pytest.raises(ValueError, match=r"tfds:no_such_set cannot be loaded: Dataset no_such_set not found"):
        load_examples("tfds:no_such_set")


def test_a_hub_id_without_the_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name is not a local file, .* pip install datasets"):
        load_examples("owner/name")


def test_a_hub_id_is_read_through_the_library(monkeypatch):
    def load_dataset(name, split):
        if name != "owner/name":
            raise ConnectionError("offline\nlong advice")
        return [{"question": f"{name} {split}", "answer": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source, split in (
        ("owner/name", "train"),
        ("owner/name:test", "test"),
        ("owner/name[:5%]", "train[:5%]"),
        ("owner/name:test[:5%]", "test[:5%]"),
    ):
        (example,) = load_examples(source, columns={"prompt": "question"})
        assert example.messages[0]["content"] == f"owner/name {split}"
        assert example.source == f"{source}:1"
    with pytest.raises(ValueError, match=r"cannot be loaded from the hub: offline; or give the path of a"):
        load_examples("owner/other")


@pytest.mark.parametrize("name", ["data/none.parquet", "data/none.jsonl.gz", "data/none.csv[:5%]"])
def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"data set data/none\.\w+(\.gz)? does not exist"):
        load_examples(name)
