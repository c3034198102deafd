"""A file that is of another format than its name says, and damaged folders: each is named, with what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from gradpursuit.config import SourceSection
from gradpursuit.data import Example, read_examples
from gradpursuit.data.formats import count
from gradpursuit.errors import DataError
from gradpursuit.sources import expand


def read(source: Any) -> list[Any]:
    return list(read_examples(expand([SourceSection.model_validate(source)])))


def refused(source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROW = b'{"prompt": "q", "completion": "a"}\n'


def table_bytes(kind: str) -> bytes:
    """The bytes of a Parquet file, or of an Arrow file of a kind, with one row."""
    table, buffer = pa.table({"prompt": ["q"], "completion": ["a"]}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", ROW)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (gzip.compress(ROW), "gzip; give it a name that ends in .gz"),
        (bz2.compress(ROW), "bzip2; decompress it first"),
        (lzma.compress(ROW), "xz; decompress it first"),
        (pa.compress(ROW, "zstd", asbytes=True), "Zstandard; decompress it first"),
        (zipped(), "zip (or a spreadsheet, .xlsx); unpack it first"),
        (tarred(), "tar; unpack it first"),
        (table_bytes("parquet"), "Parquet; give it a name that ends in .parquet"),
        (table_bytes("file"), "Arrow; give it a name that ends in .arrow"),
        (table_bytes("stream"), "Arrow; give it a name that ends in .arrow"),
        (b"SQLite format 3\0" + bytes(100), "SQLite, which is not read; export its rows as .jsonl"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page; download the file itself"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_than_its_name_says(tmp_path: Path, content: bytes, part: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    if part.split(";")[0].lower() in (ending, {"jsonl.gz": "gzip"}.get(ending)):
        assert len(read(str(path))) == 1
        return
    assert refused(str(path)).startswith(f"{path}: by its content it is ")
    assert part in refused(str(path))
    with pytest.raises(DataError, match="by its content it is "):
        count(expand([SourceSection(path=str(path))])[0])


def test_headers_of_csv_that_look_like_another_format(tmp_path: Path) -> None:
    for name in ("PAR1", "FEA1", "ARROW1", "BZh", "ORC"):
        (tmp_path / "a.csv").write_text(f"{name},prompt,completion\nx,q,a\n")
        assert len(read(str(tmp_path / "a.csv"))) == 1


def test_what_lies_in_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for content, part in (
        (gzip.compress(gzip.compress(ROW)), "holds, compressed, gzip; decompress it, and then give it a name"),
        (gzip.compress(tarred()), "holds, compressed, tar; unpack it first"),
        (gzip.compress(table_bytes("parquet")), "holds, compressed, Parquet; decompress it, and then"),
        (ROW, "not a whole gzip file: Not a gzipped file (b'{\"'); if it is not compressed, name it without .gz"),
    ):
        path.write_bytes(content)
        assert part in refused(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl.bz2",
        "a.jsonl.zst",
        "a.csv.xz",
        "a.zip",
        "a.tar.gz",
        "a.tgz",
        "a.7z",
        "a.jsonl.lz4",
        "a.json.Z",
        "a.parquet.gz",
        "a.arrow.gz",
    ],
)
def test_packed_files_are_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = refused(str(tmp_path / name))
    assert "are packed or compressed and not read; unpack it first" in message
    assert "rename" not in message


PRETTY = json.dumps({"prompt": "q", "completion": "a"}, indent=2)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", PRETTY, "a.jsonl:1: a JSON object over several lines; expected one object a line: write each on"),
        ("a.jsonl", f"\n{PRETTY}\n{PRETTY}\n", "a.jsonl:2: a JSON object over several lines"),
        ("a.json", PRETTY * 2, "a.json:1: a JSON object over several lines"),
        ("a.jsonl", (PRETTY + "\n") * 20_000, "a JSON object over several lines"),
        ("a.jsonl", json.dumps({"prompt": "q" * 2_000_000}, indent=1), "a JSON object over several lines"),
        ("a.json", json.dumps({"data": [{"a": 1}]}, indent=1), "if its list 'data' holds the rows, save that list"),
        ("a.jsonl", json.dumps([{"prompt": "q"}]), "a.jsonl:1: expected a JSON object, found list: a JSON array is"),
        ("a.ndjson", json.dumps([{"prompt": "q"}], indent=1), "found list: a JSON array is read if its file ends in"),
        ("a.jsonl", "[1, 2]\n[3, 4]\n", "a.jsonl:1: expected a JSON object, found list"),
        ("a.jsonl", '[{"role": "user"}]\n[{"role": "user"}]\n', "a.jsonl:1: expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_json_over_several_lines(tmp_path: Path, name: str, content: str, part: str) -> None:
    (tmp_path / name).write_text(content)
    assert part in refused(str(tmp_path / name))


def test_a_broken_first_line_is_one_row(tmp_path: Path) -> None:
    for broken in (b"{\n", b'{"prompt": "q"\n', b"[1]\n", b"\xff\n", b"nothing\n"):
        (tmp_path / "a.jsonl").write_bytes(broken + ROW * 3)
        found = read(str(tmp_path / "a.jsonl"))
        assert [(row.line, isinstance(row, Example)) for row in found] == [
            (1, False), (2, True), (3, True), (4, True),
        ]  # fmt: skip


def test_saved_folders_that_are_empty_or_damaged(tmp_path: Path) -> None:
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    empty.save_to_disk(tmp_path / "empty")
    assert refused(str(tmp_path / "empty")) == (
        f"{tmp_path / 'empty'}: holds no examples: the data set was saved without a row"
    )
    DatasetDict({"train": Dataset.from_list([json.loads(ROW)] * 2), "test": empty}).save_to_disk(tmp_path / "both")
    assert len(read({"path": str(tmp_path / "both"), "split": "train"})) == 2
    for name, content, part in (
        ("dataset_dict.json", "{}", "dataset_dict.json: names no splits; save the data set again"),
        ("dataset_dict.json", '{"splits": []}', "dataset_dict.json: names no splits"),
        ("dataset_dict.json", "", "dataset_dict.json: not readable: Expecting value"),
        ("dataset_dict.json", "[]", "dataset_dict.json: expected a JSON object, found list"),
        ("state.json", "{}", "cannot be read: dataset_info.json not there"),
    ):
        folder = tmp_path / "damaged"
        folder.mkdir()
        (folder / name).write_text(content)
        assert part in refused(str(folder))
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["a.parquet", "b.parquet", "c.json"], "name the files in it, as in {}/*.parquet"),
        (["README.md", "a.jsonl.gz"], "name the files in it, as in {}/*.jsonl.gz"),
        (["data/a.csv", "data/b.csv"], "name the files in it, as in {}/**/*.csv"),
        (["a.txt", "b.jsonl.zst", "c.parquet.gz"], "tsv, .parquet, .pq, .arrow, .feather: the folder holds none"),
        ([], "the folder holds none"),
    ],
)  # fmt: skip
def test_the_message_of_a_folder_names_what_it_holds(tmp_path: Path, names: list[str], part: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert refused(str(tmp_path)).endswith(part.format(tmp_path))
