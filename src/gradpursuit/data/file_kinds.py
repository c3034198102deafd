"""What a file is by its first bytes, where its name says something else, and what is wrong with a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradpursuit.errors import DataError

_UNPACK = "decompress it first"
_EXPORT = "which is not read; export its rows as .jsonl"
_SAVED_FILES = ("state.json", "dataset_info.json")
# First bytes, the name of the format, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "give it a name that ends in .gz, as in .jsonl.gz"),
    *((f"BZh{level}1AY&SY".encode(), "bzip2", _UNPACK) for level in range(1, 10)),
    (b"\xfd7zXZ\0", "xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "Zstandard", _UNPACK),
    (b"PK\x03\x04", "zip (or a spreadsheet, .xlsx)", "unpack it first, or save the sheet as .csv"),
    (b"7z\xbc\xaf\x27\x1c", "7z", _UNPACK),
    (b"Rar!\x1a\x07", "RAR", _UNPACK),
    (b"\x04\x22\x4d\x18", "LZ4", _UNPACK),
    (b"x\x9c", "zlib", _UNPACK),
    (b"PAR1\x15", "Parquet", "give it a name that ends in .parquet"),
    (b"ARROW1\0", "Arrow", "give it a name that ends in .arrow"),
    (b"\xff\xff\xff\xff", "Arrow", "give it a name that ends in .arrow"),
    (b"FEA1\0", "Feather of version 1", _EXPORT),
    (b"Obj\x01", "Avro", _EXPORT),
    (b"SQLite format 3\0", "SQLite", _EXPORT),
    (b"\x89HDF\r\n", "HDF5", _EXPORT),
    (b"\x93NUMPY", "NumPy", _EXPORT),
    (b"%PDF-", "PDF", _EXPORT),
    (b"\x80\x04\x95", "pickle", _EXPORT),
    (b"\x80\x05\x95", "pickle", _EXPORT),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with git lfs pull"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)
_OWN = {"parquet": ("Parquet",), "arrow": ("Arrow", "Feather of version 1")}  # the last has its own message


def require_kind(path: str, kind: str, head: bytes, *, packed: bool = False) -> None:
    """Refuse a file that is of another format than its name says.

    Args:
        path: of the file.
        kind: as of an :class:`~gradpursuit.sources.Input`.
        head: its first 512 bytes.
        packed: whether `head` was decompressed.

    Raises:
        DataError: it begins as files of another format do.
    """
    if head[257:262] == b"ustar":
        raise DataError(f"{path}: {'holds, compressed,' if packed else 'by its content it is'} tar; unpack it first")
    begin = head.lstrip().lower() if head.lstrip()[:1] == b"<" else head
    for magic, name, fix in _MAGIC:
        if begin.startswith(magic) and name not in _OWN.get(kind, ()):
            inside = "holds, compressed, " if packed else "by its content it is "
            fix = f"decompress it, and then {fix}" if packed and fix != _UNPACK else fix
            raise DataError(f"{path}: {inside}{name}; {fix}".replace("; which", ", which"))


def refuse_several_lines(path: str, line: int, text: str, *, cut: bool) -> None:
    """Refuse a file of JSON Lines whose first value is an array or goes over several lines.

    Args:
        path: of the file.
        line: where `text` begins.
        text: of the file, from its first value on.
        cut: whether more follows.

    Raises:
        DataError: it is such a file.
    """
    text = text.strip()
    try:
        value, stop = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        first = text.split("\n", 1)[0].strip()
        value, stop = ({"{": {}, "[": [], "[{": []}.get(first) if cut else None), len(text)
    array = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    if array and stop == len(text) and not path.lower().endswith((".json", ".json.gz")):
        raise DataError(
            f"{path}:{line}: expected a JSON object, found list: a JSON array is read if its file ends in .json"
        )
    if isinstance(value, dict) and "\n" in text[:stop]:
        inner = next((name for name, part in value.items() if isinstance(part, list) and part), None)
        rows = f"; if its list {inner!r:.80} holds the rows, save that list as the whole file" if inner else ""
        raise DataError(
            f"{path}:{line}: a JSON object over several lines; expected one object a line: write each on a line of its "
            f"own (jq -c . does so), or all as one array into a .json file{rows}"
        )


def saved_folder(path: str, split: str | None) -> str:
    """The folder of the data set, or of the split, that `save_to_disk` wrote.

    Raises:
        DataError: it is not whole, has no rows, or has other splits.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = _json_of(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits:
            raise DataError(f"{folder / 'dataset_dict.json'}: names no splits; save the data set again")
        if split not in splits:
            asked = f"no split '{split}'" if split else "several splits"
            names = ", ".join(map(str, splits))
            raise DataError(f"{path}: holds {asked}; give {{path: {path}, split: NAME}} with one of {names}")
        folder /= str(split)
    elif split:
        raise DataError(f"{path}: has no splits, so leave out split: {split}")
    _require_saved(folder)
    return str(folder)


def _require_saved(folder: Path) -> None:
    missing = [name for name in _SAVED_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: cannot be read: {' and '.join(missing)} not there; save the data set again")
    files = _json_of(folder / "state.json").get("_data_files")
    if not isinstance(files, list):
        raise DataError(f"{folder / 'state.json'}: names no '_data_files'; save the data set again")
    if not files:
        raise DataError(f"{folder}: holds no examples: the data set was saved without a row")


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable: {error}; save the data set again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}; save the data set again")
    return found
