"""Every format gives the same rows; what cannot be read is named with file and row."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import shutil
import socket
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from gradpursuit.config import SourceSection
from gradpursuit.data import Example, Unreadable, read_examples
from gradpursuit.data.formats import count
from gradpursuit.data.json_array import elements
from gradpursuit.errors import DataError
from gradpursuit.sources import content_hashes, expand, gone_note, located, stamp

ROWS = [
    {"id": "a", "prompt": "q, with a comma", "completion": 'a "quoted"\nanswer', "topic": "x"},
    {"id": "b", "prompt": "ä👋", "completion": "b", "topic": ""},
]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write(path: Path) -> None:
    """`ROWS` in the format that the name of `path` tells."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.suffix == ".jsonl" or path.name == "lines":
        path.write_text(text)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name == "lines.json":
        path.write_text(text)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=2 if "indented" in path.name else None))
    elif path.suffix in (".csv", ".tsv"):
        write_csv(path, "," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, pa.Table.from_pylist(ROWS).schema) as file:
            file.write_table(pa.Table.from_pylist(ROWS))
    else:
        Dataset.from_list(ROWS).save_to_disk(path)


def read(*sources: Any, **columns: str) -> list[Any]:
    return list(read_examples(expand([SourceSection.model_validate(source) for source in sources]), columns))


def refused(*sources: Any, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read(*sources, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = (
    "a.jsonl",
    "lines",
    "a.jsonl.gz",
    "lines.json",
    "a.json",
    "indented.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "a.arrow",
    "saved",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    found = read(str(tmp_path / name))
    assert [example.columns for example in found] == ROWS
    assert [example.id for example in found] == ["a", "b"]
    assert {example.file for example in found} == {example.source for example in found} == {str(tmp_path / name)}
    (made,) = expand([SourceSection(path=str(tmp_path / name))])
    assert count(made) == 2


def test_places_are_lines_where_there_are_lines(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet", "saved", "a.json"):
        write(tmp_path / name)
    assert [example.line for example in read(str(tmp_path / "a.csv"))] == [2, 4]  # a text of two lines
    for name in ("a.parquet", "saved", "a.json"):
        assert [example.line for example in read(str(tmp_path / name))] == [1, 2]


def test_globs_and_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    found = read({"path": str(tmp_path / "*.jsonl"), "name": "mine"}, str(tmp_path / "sub" / "c.jsonl"))
    assert [example.conversation.messages[0]["content"] for example in found] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [example.source for example in found] == ["mine", "mine", str(tmp_path / "sub" / "c.jsonl")]
    assert len(read(str(tmp_path / "**" / "*.jsonl"))) == 3
    message = refused(str(tmp_path / "*.csv"))
    assert "*.csv: no file matches" in message
    assert "is named twice" in refused(str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"))
    odd = tmp_path / "[x].jsonl"
    odd.write_text(json.dumps({"prompt": "odd", "completion": "x"}) + "\n")
    assert len(read(str(odd))) == 1


def test_files_that_stand_for_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "saved")
    write(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    sources = {"pool": [SourceSection(path=path) for path in ("*.jsonl", "saved", "me/data")]}
    sources["target"] = [SourceSection(path="a.jsonl")]
    before = content_hashes(sources, {})
    assert {name: list(hashes) for name, hashes in before.items()} == {
        "pool": ["a.jsonl", "saved", "me/data"],
        "target": ["a.jsonl"],
    }
    assert len({digest for hashes in before.values() for digest in hashes.values()}) == 3
    stamps = {path: stamp(path) for path in before["pool"]}
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"other")
    after = content_hashes(sources, before)
    assert content_hashes(sources, before, stamps) == after, "a file in a folder has changed, not the folder"
    assert [path for path in before["pool"] if before["pool"][path] != after["pool"][path]] == ["saved"]
    (tmp_path / "a.jsonl").unlink()
    shutil.rmtree(tmp_path / "saved")
    assert content_hashes(sources, after) == after
    assert gone_note(after) == "not there any more: a.jsonl, saved; what was made of it is used"
    with pytest.raises(DataError, match="no file matches"):
        content_hashes(sources, {})
    assert located(SourceSection(path="*.jsonl", name="x")) == SourceSection(path=str(tmp_path / "*.jsonl"), name="x")
    assert located(SourceSection(path="me/data")).path == "me/data"
    assert located(SourceSection(path="me/data.csv")).path == str(tmp_path / "me" / "data.csv")


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "d")
    path = str(tmp_path / "d")
    assert len(read({"path": path, "split": "test"})) == 1
    assert f"holds several splits; give {{path: {path}, split: NAME}} with one of train, test" in refused(path)
    assert "holds no split 'valid'" in refused({"path": path, "split": "valid"})
    write(tmp_path / "saved")
    assert "has no splits, so leave out split: train" in refused({"path": str(tmp_path / "saved"), "split": "train"})
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    assert "saved: cannot be read: " in refused(str(tmp_path / "saved"))


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    when, price = datetime.datetime(2024, 10, 16, 12, 30), Decimal("1.50")
    row = {"prompt": "q", "completion": "a", "when": when, "price": price, "day": when.date()}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (example,) = read(str(tmp_path / "a.parquet"))
    kept = {"when": "2024-10-16T12:30:00", "price": "1.50", "day": "2024-10-16"}
    assert json.loads(example.original) == {"prompt": "q", "completion": "a", **kept}
    pq.write_table(pa.Table.from_pylist([{**row, "image": b"\x89PNG"}]), tmp_path / "b.parquet")
    message = refused(str(tmp_path / "b.parquet"))
    assert "b.parquet:1: column 'image': holds bytes, which cannot be kept as JSON" in message


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.json", b"[5]", "a.json:1: expected a JSON object, found int"),
        ("a.json", b"[" * 200_000, "a.json: not usable JSON: nested more than 100 deep"),
        ("a.json", b'[{"prompt": "q", "prompt": "a"}]', "a.json:1: the key 'prompt' is there twice"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", "a.json:1: not usable JSON: Exceeds the limit"),
        ("a.json", b'[{"prompt": "q"\n "completion": "a"}]', "a.json:2: not valid JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"prompt": "q", "completion": "a"}', "not valid JSON: Expecting ',' or ']'"),
        ("a.json", b'[{"prompt": "q", "completion": "a"}] x', "not valid JSON: Extra data"),
        ("a.json", b'[{"prompt": "q", "completion": "a', "not valid JSON: Unterminated string"),
        ("a.json", b'[{"prompt": "\\ud83d", "completion": "a"}]', "a.json:1: column 'prompt': holds half a character"),
        ("a.json", b'[{"prompt": "\xe9", "completion": "a"}]', "a.json:1: column 'prompt': not UTF-8: byte 0xe9"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16"), "not UTF-8 but UTF-16"),
        ("a.csv", "prompt,completion".encode("utf-16-le"), "not UTF-8 but UTF-16"),
        ("a.json", b"[]", "holds no examples"),
        ("a.json", b'{"data": [1]}', "a.json:1: columns found: 'data'; expected"),
        ("a.csv", b"", "holds no examples"),
        ("a.csv", b"prompt,completion\nq\n", "a.csv:2: has 1 fields, the header has 2; put text that holds commas"),
        ("a.csv", b"prompt,completion\nq,a,b\n", "a.csv:2: has 3 fields"),
        ("a.csv", b"prompt,prompt\nq,a\n", "a.csv:1: the header needs a different name for every column"),
        ("a.csv", b"prompt,\nq,a\n", "a.csv:1: the header needs a different name"),
        ("a.csv", b'prompt,completion\nq,"a\n', "a.csv:2: not valid CSV: unexpected end of data"),
        ("a.csv", b"prompt,completion\nq,caf\xe9\n", "not UTF-8"),
        ("a.csv", b"prompt;completion\nq;a\n", "one column, 'prompt;completion': the file is separated by ';'"),
        ("a.csv", b"prompt\tcompletion\nq\ta\n", "not by ','; save it with commas, or with tabs as .tsv"),
        ("a.tsv", b"prompt,x;completion\nq;a\n", "a.tsv:1: the header is one column"),
        ("a.txt", b'{"prompt": "q", "completion": "a"}', "a.txt: files that end in '.txt' are not read, only .jsonl,"),
        ("a.xlsx.gz", b"x", "a.xlsx.gz: files that end in '.xlsx' are not read"),
        ("a.parquet", b"no parquet", "a.parquet: not readable: "),
        ("a.arrow", b"no arrow", "a.arrow: not readable: "),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 999)[:-30], "not a whole gzip file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(str(tmp_path / name))
    assert part in message
    assert message.startswith(str(tmp_path / name))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), str(tmp_path / "socket"), "/dev/zero"):
        assert refused(path) == (
            f"{path}: a pipe, a socket or a device; only files and folders are read: save it as a file first"
        )
    assert "circle.jsonl: cannot be read: Too many levels of symbolic links" in refused(str(tmp_path / "circle.jsonl"))
    assert "File name too long" in refused("x" * 5000)
    assert "cannot hold the character NUL" in refused("a\0b.jsonl")
    assert refused("~nosuchuser/a.jsonl").startswith(
        "~nosuchuser/a.jsonl: there is no user 'nosuchuser' here; write ./~"
    )
    for path, part in (("a\0b", "NUL"), ("~nosuchuser/a", "no user"), (str(tmp_path / "circle.jsonl"), "levels")):
        with pytest.raises(DataError, match=part):
            located(SourceSection(path=path))


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "b.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "other")
    for name in ("one", "two", "three"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    found = expand([SourceSection(path=str(tmp_path / "data" / "**" / "*.jsonl"))])
    assert [made.path for made in found] == [str(tmp_path / "data" / "linked" / "b.jsonl")]
    assert len(expand([SourceSection(path=str(tmp_path / "**"))])) == 2


def test_rows_of_a_table_that_python_cannot_hold(tmp_path: Path) -> None:
    text = pa.array(["q", "q", "q"])
    bad = pa.StringArray.from_buffers(3, pa.array(["a", "bc", "d"]).buffers()[1], pa.py_buffer(b"a\xff\xfed"))
    pq.write_table(pa.table({"prompt": text, "completion": bad}), tmp_path / "a.parquet")
    days = pa.array([0, 2**30, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": text, "completion": text, "day": days}), tmp_path / "b.parquet")
    for name, part in (
        ("a", "column 'completion' cannot be read: 'utf-8' codec"),
        ("b", "column 'day' cannot be read"),
    ):
        found = read(str(tmp_path / f"{name}.parquet"))
        assert [row.line for row in found] == [1, 2, 3]
        assert [isinstance(row, Unreadable) for row in found] == [False, True, False]
        assert part in found[1].detail
    zone = pa.array([0, 1, 2], pa.timestamp("us", "Mars/Phobos"))
    pq.write_table(pa.table({"prompt": text, "completion": text, "at": zone}), tmp_path / "c.parquet")
    assert "c.parquet:1: column 'at' cannot be read" in refused(str(tmp_path / "c.parquet"))
    twice = pa.Table.from_arrays([text, text], names=["text", "text"])
    pq.write_table(twice, tmp_path / "d.parquet")
    assert "d.parquet: has two columns of the name 'text'" in refused(str(tmp_path / "d.parquet"))


def test_rows_of_a_csv_file_are_dropped_one_by_one(tmp_path: Path) -> None:
    content = b'prompt,completion\nq,a\nq\n"x"y,b\nq,caf\xe9\nq,nul\0\nq,"two\nlines"\n'
    (tmp_path / "a.csv").write_bytes(content)
    found = read(str(tmp_path / "a.csv"))
    assert [(row.line, isinstance(row, Example)) for row in found] == [
        (2, True), (3, False), (4, False), (5, False), (6, True), (7, True),
    ]  # fmt: skip
    assert [row.reason for row in found if isinstance(row, Unreadable)] == [
        "has … fields, the header has …",
        "not valid CSV: ',' expected after '\"'",
        "column 'completion': not UTF-8",
    ]


def test_damaged_archives(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(json.dumps(ROWS[0]).encode() * 50))
    for at in range(10, len(whole), 7):
        damaged = bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        assert "a.jsonl.gz" in refused(str(tmp_path / "a.jsonl.gz"))


def test_missing_files_of_every_format(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"):
        assert f"{name}: cannot be read: " in refused(str(tmp_path / name))


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_name(*arguments: Any, **options: Any) -> Any:
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", no_name)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    message = refused("someone/instructions")
    assert message.startswith("someone/instructions: there is no such file or folder here, and the hub cannot be")


def test_a_hub_data_set_is_streamed_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here: the library's own streamed data set of a local file stands for one of the hub."""
    write(tmp_path / "a.parquet")
    asked = []

    def load(path: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((path, subset, split, revision, streaming))
        if split == "gone":
            raise ValueError('Unknown split "gone".\nShould be one of train')
        return load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=streaming)

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("gradpursuit.data.formats.hub_can_be_asked", lambda: True)
    found = read({"path": "someone/chats", "subset": "en", "split": "test", "revision": "v1", "name": "chats"})
    assert [example.columns for example in found] == ROWS
    assert [(example.source, example.file, example.line) for example in found] == [
        ("chats", "someone/chats", 1),
        ("chats", "someone/chats", 2),
    ]
    assert asked == [("someone/chats", "en", "test", "v1", True)]
    assert count(expand([SourceSection(path="someone/chats")])[0]) is None
    assert "someone/chats: cannot be read from the hub: Unknown split" in refused(
        {"path": "someone/chats", "split": "gone"}
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 4096])
def test_json_lists_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int) -> None:
    values = [
        {"a": 'x"]}, {', "n": 12345678901234567890, "l": [1, [2]]},
        17,
        "s\\u00e9\\",
        None,
        {},
        [],
        -1.5e-7,
        "ü👋",
    ]
    path = tmp_path / "a.json"
    for indent in (None, 3):
        path.write_text("  " + json.dumps(values, indent=indent) + " \n")
        monkeypatch.setattr("gradpursuit.data.json_array._CHUNK", chunk)
        with path.open(encoding="utf-8") as file:
            found = list(elements(file))
        assert [value for _, value in found] == values
        assert [number for number, _ in found] == list(range(1, len(values) + 1))


@pytest.mark.parametrize("chunk", [4, 64, 4096])
def test_a_mistake_in_a_long_list_has_its_line_and_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int
) -> None:
    monkeypatch.setattr("gradpursuit.data.json_array._CHUNK", chunk)
    lines = ["["] + [f'  {{"prompt": "{i}", "completion": "x"}},' for i in range(50)]
    lines[30] = '  {"prompt": "29", "completion" "x"},'
    path = tmp_path / "a.json"
    path.write_text("\n".join([*lines, "{}]"]))
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(path.read_text())
    with pytest.raises(json.JSONDecodeError) as pieces, path.open(encoding="utf-8") as file:
        list(elements(file))
    found, expected = pieces.value, whole.value
    assert (
        (found.lineno, found.colno, found.msg) == (expected.lineno, expected.colno, expected.msg) == (31, 33, found.msg)
    )
