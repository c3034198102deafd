"""From what a command names, a YAML file or a run folder, to a configuration that holds wherever it is read."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path

from gradpursuit import marker
from gradpursuit.aside import is_interrupted
from gradpursuit.config import RunConfig, load_config
from gradpursuit.errors import ConfigError, DamagedError, RunError
from gradpursuit.lock import RunLock, holder
from gradpursuit.manifest import Manifest
from gradpursuit.remote import absolute, is_url
from gradpursuit.remote import located as located_place
from gradpursuit.sealed import is_sealed_text
from gradpursuit.sources import located


def named_config(name: str, overrides: list[str], run_dir: str | None = None) -> RunConfig:
    """The configuration that is meant by a YAML file or a run folder.

    Raises:
        RunError: there is no such folder.
        ConfigError: as :func:`~gradpursuit.config.load_config`.
    """
    path = Path(name)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise RunError(f"{path}: no such run folder; `gradpursuit warmup CONFIG.yaml` begins one")
    return read_config(path / "config.yaml" if path.is_dir() else path, overrides, run_dir)


def begun_config(name: str, overrides: list[str]) -> RunConfig:
    """The configuration of a run that was begun, by its folder.

    Raises:
        RunError: it is none.
        ConfigError: as :func:`~gradpursuit.config.load_config`.
    """
    return read_config(run_folder(name) / "config.yaml", overrides)


def run_folder(name: str, *, damaged: bool = False) -> Path:
    """The folder of a run that was begun; `damaged`: it may lack its configuration or its manifest, but not both.

    Raises:
        RunError: it is none.
    """
    path = Path(name)
    _settle(path)
    if path.is_file():
        where = f"run_dir of the configuration, or runs/{path.stem}"
        raise RunError(f"{path}: a file; give the run folder instead: {where}")
    present = [(path / name).is_file() for name in ("config.yaml", "manifest.json", marker.NAME)]
    if not all(present[:2]) and not (damaged and sum(present) > 1):
        if owner := holder(path):
            raise RunError(f"{path}: {owner} is at work here, but has not begun a stage; look again in a moment")
        lacking = " and ".join(name for name in ("config.yaml", "manifest.json") if not (path / name).is_file())
        what = "no such folder" if not path.exists() else f"not a run folder, or a damaged one: it holds no {lacking}"
        raise RunError(f"{path}: {what}; `gradpursuit run CONFIG.yaml` begins one")
    return path


def read_config(path: Path, overrides: list[str], run_dir: str | None = None) -> RunConfig:
    """Read a configuration; paths become absolute, so that a saved one can be replayed from anywhere.

    The configuration of a run folder is that of the folder it lies in, wherever that was moved to, unless `run_dir`
    names another.

    Raises:
        DamagedError: it is that of a run folder, and it or the manifest there is not what the run wrote.
        ConfigError: as :func:`~gradpursuit.config.load_config`.
    """
    _settle(path.parent)
    if path.name == "config.yaml" and (path.parent / "manifest.json").is_file():
        if run_dir is None or Path(run_dir).resolve() == path.parent.resolve():
            Manifest(path.parent).read()
        _refuse_changed(path)
    # Without a manifest, too: run_dir in the settings of a copy names another run.
    of_a_run = any((path.parent / name).is_file() for name in ("manifest.json", marker.NAME))
    if run_dir is None and (of_a_run or (path.name == "config.yaml" and is_sealed_text(path))):
        run_dir = str(path.parent)
    if run_dir is not None:
        overrides = [*overrides, f"run_dir={json.dumps(run_dir)}"]  # a text, whatever YAML would take it for
    config = load_config(path, overrides)
    data, model = config.data, absolute(config.model.path)
    files = {name: getattr(data, name) for name in ("pool", "target", "heldout")}
    located_files = {name: None if sources is None else list(map(located, sources)) for name, sources in files.items()}
    return config.model_copy(
        update={
            "run_dir": str(run_place(config.run_dir or f"runs/{path.stem}")),
            "data": data.model_copy(update={**located_files, "chat_template": _template(data.chat_template)}),
            "gradients": config.gradients.model_copy(update={"store": located_place(config.gradients.store)}),
            "warmup": config.warmup.model_copy(update={"trajectory": list(map(_absolute, config.warmup.trajectory))}),
            "model": config.model.model_copy(update={"path": str(model)}) if model.exists() else config.model,
        }
    )


def run_place(text: str) -> Path:
    """The absolute path of a run folder.

    Raises:
        ConfigError: it is a URL, the root of the file system, or leads nowhere.
    """
    if is_url(text):
        raise ConfigError(
            f"run_dir '{text}': a run folder lies on a disk; only gradients.store may be a URL. Name a folder"
        )
    path = absolute(text)
    if not path.name:
        raise ConfigError(f"run_dir '{text}': the root of a file system is no run folder; name a folder in it")
    return path


def _settle(folder: Path) -> None:
    """Put back what a killed process had set aside in a run folder, unless somebody is at work there."""
    if is_interrupted(folder) and holder(folder) is None:
        with suppress(RunError), RunLock(folder):
            pass


def _refuse_changed(path: Path) -> None:
    """The configuration of a run must be as the run wrote it: nobody can tell an edit from damage."""
    if not is_sealed_text(path):
        run = shlex.join(["gradpursuit", "run", "COPY.yaml", "--run-dir", str(path.parent)])
        raise DamagedError(
            path,
            "it is not what the run wrote",
            "put it back from a copy. If you edited it: give settings as flags (--selection.k 50), or move it away, "
            f"say as COPY.yaml, and run `{run}`",
        )


def _absolute(path: str) -> str:
    return str(absolute(path))


def _template(value: str | None) -> str | None:
    """The setting data.chat_template, with the path of a file made absolute."""
    if value is None:
        return None
    from gradpursuit.data.template_file import is_template_text

    try:
        return value if is_template_text(value) else _absolute(value)
    except (OSError, RuntimeError, ValueError):  # no such user, a NUL: whoever reads the file says so
        return value
