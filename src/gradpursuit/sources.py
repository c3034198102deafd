"""From what the configuration says to the files, folders and hub data sets that are read, and how they are known again.

Nothing is opened here but to be hashed.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradpursuit.config import SourceSection
from gradpursuit.errors import DataError
from gradpursuit.files import sha256_of, stamp_of

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "saved", "hub"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COLUMNAR = ("parquet", "arrow")
_PACKED = (
    *(".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".lzma", ".lz", ".br", ".z", ".sz", ".snappy"),
    *(".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar"),
)
_FEW = 10_000  # files of a folder that are looked at for a message
_SAVED = ("state.json", "dataset_dict.json")  # one of them is in every folder of `save_to_disk`
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Input:
    """One file, saved folder or hub data set.

    Attributes:
        path: of the file or folder, or the hub id.
        kind: how it is read; a file without an ending is JSON Lines.
        source: what the configuration says about it.
    """

    path: str
    kind: Kind
    source: SourceSection

    @property
    def name(self) -> str:
        """What its rows are counted and grouped under."""
        return self.source.name or self.path


def expand(sources: Sequence[SourceSection]) -> list[Input]:
    """Every input that the sources name, in order; the matches of a glob by name.

    Raises:
        DataError: a glob matches nothing, a folder is none of `save_to_disk`, a file is of another kind or no regular
            one, a path can be none, or an input is named twice.
    """
    found = [made for source in sources for made in _expand(source)]
    places: dict[tuple[str, str], Input] = {}
    for made in found:
        key = (made.path, str(made.source.options))
        if key in places:
            raise DataError(f"{made.path}: is named twice (by '{places[key].source.path}' and '{made.source.path}')")
        places[key] = made
    return found


def _expand(source: SourceSection) -> Iterator[Input]:
    path = _user_path(source.path)
    there = _is_there(path, source.path)
    if there or not glob.has_magic(source.path):
        yield _input(str(path) if there else source.path, source)
        return
    matches = [match for match in _matches(str(path)) if Path(match).is_file() or _is_saved(Path(match))]
    if not matches:
        raise DataError(f"{source.path}: no file matches; in quotes a shell leaves the pattern as it is")
    for match in matches:
        yield _input(match, source)


def _user_path(text: str) -> Path:
    """A path with the home folder for `~`.

    Raises:
        DataError: it can be the path of no file.
    """
    if "\0" in text:
        raise DataError(f"{text!r}: a path cannot hold the character NUL; correct it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise DataError(
            f"{text}: there is no user '{Path(text).parts[0][1:]}' here; write ./{text} for a file whose name begins so"
        ) from None


def _is_there(path: Path, text: str) -> bool:
    """Whether anything lies at a path.

    Raises:
        DataError: that cannot be said: the name is too long, links go in a circle, a folder may not be looked into.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if glob.has_magic(text):
            return False
        raise DataError(f"{text:.300}: cannot be read: {error.strerror or error}") from None
    return True


def _matches(pattern: str) -> list[str]:
    """What a glob matches, by name; with `**`, links are followed, but into no folder that was looked into before."""
    if "**" not in Path(pattern).parts:
        return sorted(glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    parts = Path(pattern).parts
    at = parts.index("**")
    seen: set[tuple[int, int]] = set()
    found: set[str] = set()
    for top in glob.glob(str(Path(*parts[:at]))) if at else ["."]:  # noqa: PTH207
        for folder, inner, _ in os.walk(top, followlinks=True):
            stat = Path(folder).stat()
            if (stat.st_dev, stat.st_ino) in seen:
                inner.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            here = Path(glob.escape(folder), *(parts[at + 1 :] or ("*",)))
            found.update(_matches(str(here)) if "**" in here.parts else glob.glob(str(here)))  # noqa: PTH207
    return sorted(found)


def _input(name: str, source: SourceSection) -> Input:
    path = Path(name)
    if _is_there(path, name) and not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{name}: a pipe, a socket or a device; only files and folders are read: save it as a file first"
        )
    if path.is_dir():
        if not _is_saved(path):
            raise DataError(f"{name}: a folder, but not one that datasets.save_to_disk wrote; {_files_to_name(path)}")
        return Input(name, "saved", source)
    if is_hub_id(name):
        return Input(name, "hub", source)
    ending = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    packed = path.suffix if path.suffix.lower() == ".gz" and _SUFFIXES.get(ending.lower()) in _COLUMNAR else ending
    if packed.lower() in _PACKED and path.exists():
        raise DataError(
            f"{name}: files that end in '{packed}' are packed or compressed and not read; unpack it first, and name "
            f"what was in it ({', '.join(_SUFFIXES)}; text also as .gz)"
        )
    if ending and ending.lower() not in _SUFFIXES and path.exists():
        raise DataError(
            f"{name}: files that end in '{ending}' are not read, only {', '.join(_SUFFIXES)} (text also as .gz) and "
            "folders of datasets.save_to_disk; if it is one of these, rename it"
        )
    return Input(name, _SUFFIXES.get(ending.lower(), "jsonl"), source)


def _files_to_name(folder: Path) -> str:
    """What to do about a folder: the glob of most of the files in it that can be read."""
    for pattern in ("*", "**/*"):
        few = itertools.islice(folder.glob(pattern), _FEW)
        endings = Counter(_ending(path) for path in few if _ending(path) and path.is_file())
        if endings:
            (ending, _), *_ = endings.most_common(1)
            return f"name the files in it, as in {folder}/{pattern}{ending}"
    return f"name a file of {', '.join(_SUFFIXES)}: the folder holds none"


def _ending(path: Path) -> str:
    """The ending of a file that can be read by it, else nothing."""
    inner = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    packed = path.suffix if inner != path.suffix else ""
    kind = _SUFFIXES.get(inner.lower())
    return inner + packed if kind and not (packed and kind in _COLUMNAR) else ""


def short_names(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of every source of some rows, in order, the name that people read; no two have the same.

    A source that goes by the path of its file or folder is told by the last parts of it that no other source ends with;
    what a user called one, and a hub id, stays as it is.

    Args:
        rows: the source and the file of each.
    """
    distinct = set(rows)
    given = {source for source, file in distinct if source != file or is_hub_id(source)}
    every = sorted({source for source, _ in distinct})
    shared = Counter(ending for source in every for ending in _endings(source))
    return {
        source: source if source in given else next((end for end in _endings(source) if shared[end] == 1), source)
        for source in every
    }


def _endings(source: str) -> list[str]:
    """The last part of a path, the last two, and so on."""
    parts = Path(source).parts
    return [str(Path(*parts[-count:])) for count in range(1, len(parts) + 1)]


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be the id of a data set on the hub: `owner/name`, and nothing of that name here."""
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in _SUFFIXES:
        return False
    return not _is_there(Path(name), name)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def located(source: SourceSection) -> SourceSection:
    """The same source by its :func:`located_path`."""
    return source.model_copy(update={"path": located_path(source.path)})


def located_path(path: str) -> str:
    """The absolute path of a file, folder or glob, by which it is found from anywhere; a hub id stays as it is.

    Raises:
        DataError: it can be the path of no file.
    """
    if is_hub_id(path):
        return path
    try:
        return str(_user_path(path).resolve())
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        said = "Too many levels of symbolic links" if isinstance(error, RuntimeError) else error.strerror or error
        raise DataError(f"{path:.300}: cannot be read: {said}") from None


Hashes = Mapping[str, Mapping[str, str]]  # sha256 of every file, saved folder and hub id, by split and path


def content_hashes(
    splits: Mapping[str, Sequence[SourceSection]], known: Hashes, stamps: Mapping[str, list[int]] | None = None
) -> dict[str, dict[str, str]]:
    """The hashes of all that the sources of some splits are made of.

    What is `known` is taken if it is gone, or is what its stamp says.

    Raises:
        DataError: a file is not there, or a glob matches nothing, and no known file either.
        RunError: a file cannot be read, and what was in it is not known.
    """
    stamps = stamps or {}
    made = {name: list(paths(sources, known.get(name, {}))) for name, sources in splits.items()}
    for name, found in made.items():  # all of them before any is read: files may be large
        for path in found:
            if path not in known.get(name, {}) and not is_hub_id(path) and not _is_there(Path(path), path):
                raise DataError(
                    f"{path}: no such file for the {name}; correct the path: a relative one goes from the folder that "
                    "the command runs in"
                )
    return {
        name: {
            path: before[path] if path in before and stamp(path) in ([], stamps.get(path)) else _content_hash(path)
            for path in found
        }
        for name, found in made.items()
        for before in [known.get(name, {})]
    }


def paths(sources: Sequence[SourceSection], known: Iterable[str]) -> Iterator[str]:
    """Of every file, saved folder and hub id that the sources are made of.

    A glob that matches nothing any more stands for what is `known` to have matched it.

    Raises:
        DataError: it matches none of those either.
    """
    for source in sources:
        try:
            yield from [made.path for made in _expand(source)]
        except DataError:
            gone = [path for path in known if fnmatch.fnmatch(path, source.path)]
            if not gone:
                raise
            yield from gone


def stamp(path: str) -> list[int]:
    """Size, and time of the last change, of what lies at a path; empty if nothing does."""
    if not Path(path).is_dir():
        return stamp_of(path)
    found = [stamp_of(str(file)) for file in _files(Path(path))]
    return [sum(size for size, _ in found), max(changed for _, changed in found)]


def gone_note(hashes: Hashes) -> str:
    """What there is to say of files that are not there any more, though what was made of them is."""
    named = dict.fromkeys(path for split in hashes.values() for path in split)
    return missing_note(path for path in named if not is_hub_id(path))


def missing_note(names: Iterable[str]) -> str:
    """The same of files and folders by name."""
    gone = [path for path in names if not Path(path).exists()]
    return f"not there any more: {', '.join(gone)}; what was made of it is used" if gone else ""


def _content_hash(path: str) -> str:
    """sha256 (hex) of what lies at a path; a hub id stands for content that is not at hand."""
    if is_hub_id(path):
        return hashlib.sha256(path.encode()).hexdigest()
    folder = Path(path)
    if not folder.is_dir():
        return sha256_of(folder)
    listing = "".join(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n" for file in _files(folder))
    return hashlib.sha256(listing.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
