"""The command line: parse, call one function, print. Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradpursuit import __version__
from gradpursuit.errors import ConfigError, GradPursuitError, RunError

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig
    from gradpursuit.pipeline import Run

STAGE_VERBS = {
    "warmup": ("data", "trajectory", "clean the data and train the warm-up trajectory"),
    "collect": ("gradients", "gradients", "collect the gradients of pool and target along the trajectory"),
    "select": ("selection", "selection", "choose the examples with every configured strategy"),
    "export": ("export", "export", "write selected.jsonl for every strategy"),
    "compare": ("evaluation", "report", "fine-tune on every selection, score held-out examples, write the report"),
}
OVERRIDES = "every setting is also a flag that overrides the file: --selection.k 50, --seed 1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments, overrides = _parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("gradpursuit").setLevel(logging.DEBUG)
    console = _console()
    try:
        arguments.verb(arguments, overrides)
    except GradPursuitError as error:
        console.clear_line()
        print(f"gradpursuit: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # the disk, wherever it fails
        console.clear_line()
        place = f"{error.filename}: " if error.filename else ""
        print(f"gradpursuit: error: {place}{error.strerror or error}; finished work is kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.clear_line()
        print("gradpursuit: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def quickstart(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit quickstart`."""
    from gradpursuit.quickstart.job import quickstart_config

    _quiet_libraries()
    config = quickstart_config(Path(arguments.run_dir), overrides)
    _execute(config, "report")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit run config.yaml`."""
    _quiet_libraries()
    if arguments.run_dir:
        overrides = [*overrides, f"run_dir={arguments.run_dir}"]
    _execute(_load(Path(arguments.config), overrides), "report")


def stage(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit warmup|collect|select|export|compare RUN`."""
    first, last, _ = STAGE_VERBS[arguments.name]
    path = Path(arguments.run)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise RunError(f"{path}: no such run folder; `gradpursuit warmup CONFIG.yaml` begins one")
    _quiet_libraries()
    _execute(_load(path / "config.yaml" if path.is_dir() else path, overrides), last, first)


def _execute(config: RunConfig, upto: str, first: str | None = None) -> None:
    from gradpursuit.pipeline import Run

    made = Run(config)
    fresh = not made.folder.exists()
    handler = _log_file(made.folder)
    try:
        made.execute(upto, first)
    finally:
        logging.getLogger("gradpursuit").removeHandler(handler)
        handler.close()
        if fresh and not made.manifest.has_finished("data"):
            shutil.rmtree(made.folder, ignore_errors=True)  # a mistake was met before anything was made
    if upto == "report":
        _print_table(made)
    print(f"run folder: {made.folder}")


def _load(path: Path, overrides: list[str]) -> RunConfig:
    """Read a configuration; paths become absolute, so that a saved one can be replayed from anywhere.

    The configuration of a run folder is that of the folder it lies in, wherever that was moved to.
    """
    from gradpursuit.config import load_config

    if (path.parent / "manifest.json").is_file() and not any(o.startswith("run_dir=") for o in overrides):
        overrides = [*overrides, f"run_dir={path.parent}"]
    config = load_config(path, overrides)
    data, model = config.data, Path(config.model.path).expanduser()
    absolute = {name: [_absolute(file) for file in getattr(data, name)] for name in ("pool", "target", "heldout")}
    return config.model_copy(
        update={
            "run_dir": _absolute(config.run_dir or f"runs/{path.stem}"),
            "data": data.model_copy(update=absolute),
            "warmup": config.warmup.model_copy(update={"trajectory": list(map(_absolute, config.warmup.trajectory))}),
            "model": config.model.model_copy(update={"path": str(model.resolve())}) if model.exists() else config.model,
        }
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="gradpursuit", description="Pick the training examples that a target needs, jointly, by their gradients."
    )
    parser.add_argument("--version", action="version", version=f"gradpursuit {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("quickstart", help="the whole job on a small real model and real data", epilog=OVERRIDES)
    verb.add_argument("--run-dir", default="runs/quickstart", help="the run folder (default: %(default)s)")
    verb.set_defaults(verb=quickstart)
    verb = verbs.add_parser("run", help="the whole job on your own files", epilog=OVERRIDES)
    verb.add_argument("config", help="the configuration, a YAML file; see examples/")
    verb.add_argument("--run-dir", help="the run folder (default: run_dir of the file, or runs/<name of the file>)")
    verb.set_defaults(verb=run)
    for name, (_first, _last, text) in STAGE_VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, epilog=OVERRIDES)
        verb.add_argument("run", metavar="RUN", help="a run folder, or a configuration that names one")
        verb.set_defaults(verb=stage, name=name)
    try:
        words, overrides = _split(argv)
    except ConfigError as error:
        parser.error(str(error))
    return parser.parse_args(words), overrides


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Plain words, and the settings `--section.key VALUE` or `--section.key=VALUE` as `section.key=VALUE`."""
    words, overrides, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        if not (flag.startswith("--") and "." in flag) and flag != "--seed":
            words.append(word)
        elif equals:
            overrides.append(word[2:])
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{word[2:]}={rest.pop(0)}")
        else:
            raise ConfigError(f"flag '{word}' has no value: write {word} VALUE")
    return words, overrides


class _Console(logging.Handler):
    """Prints records to stderr; on a terminal, progress stays on one line."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._terminal, self._open = sys.stderr.isatty(), False

    def clear_line(self) -> None:
        """Leave the progress line, if there is one."""
        if self._open:
            sys.stderr.write("\r\x1b[K")
            self._open = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self.clear_line()
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        if getattr(record, "progress", False) and self._terminal:
            sys.stderr.write(prefix + record.getMessage())
            self._open = True
        else:
            sys.stderr.write(prefix + record.getMessage() + "\n")
        sys.stderr.flush()


def _console() -> _Console:
    logger = logging.getLogger("gradpursuit")
    for handler in [h for h in logger.handlers if isinstance(h, _Console)]:
        logger.removeHandler(handler)
    console = _Console()
    logger.addHandler(console)
    logger.propagate = False
    return console


def _log_file(folder: Path) -> logging.Handler:
    from gradpursuit.files import disk_error

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, folder) from error
    logging.raiseExceptions = False  # a full disk is told once, by whatever stage meets it
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("gradpursuit").addHandler(handler)
    return handler


def _quiet_libraries() -> None:
    """Their progress bars and advice would drown the run's own words; errors still come as exceptions."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)(\..*)?")


def _print_table(made: Run) -> None:
    from rich.console import Console

    from gradpursuit.report.terminal import comparison_table, timing_table

    console = Console()
    console.print(comparison_table(made.lines()))
    console.print(timing_table(made.manifest.read()))


if __name__ == "__main__":
    sys.exit(main())
