"""The command line: parse, call one function, print. Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit import __version__
from gradpursuit.console import at_work, console, ended_as_by_ctrl_c, plain_streams, quiet_libraries
from gradpursuit.errors import ConfigError, GradPursuitError, RunError
from gradpursuit.export_verb import add_export_flags, asks_for_budget, export_with_budget
from gradpursuit.shown import json_text, rich_console, shown

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig
    from gradpursuit.pipeline import Run

STAGE_VERBS = {
    "warmup": ("data", "trajectory", "clean the data and train the warm-up trajectory"),
    "collect": ("gradients", "gradients", "collect the gradients of pool and target along the trajectory"),
    "select": ("selection", "selection", "choose the examples with every configured strategy"),
    "export": ("export", "export", "write the chosen rows for trainers, all of them or as many as a budget buys"),
    "compare": ("export", "report", "fine-tune on every selection, score held-out examples, write the report"),
}
NEXT = {"trajectory": "collect", "gradients": "select", "selection": "export", "export": "compare"}
OVERRIDES = (
    "every setting is also a flag that overrides the file: --selection.k 50, --seed 1; "
    "on a Ray cluster: --engine ray [--address HOST:PORT]"
)
UNEXPECTED = 10  # files that a run did not write, of which `verify` shows so many
SHORT = {"--engine": "--engine.name", "--address": "--engine.address"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for bad input, 130 when interrupted or asked to end (SIGTERM)."""
    with plain_streams():
        return _run_verb(sys.argv[1:] if argv is None else argv)


def _run_verb(argv: Sequence[str]) -> int:
    arguments, overrides = _parse(argv)
    logging.getLogger("gradpursuit").setLevel(logging.DEBUG)
    try:
        with ended_as_by_ctrl_c(), console(quiet=arguments.quiet):
            arguments.verb(arguments, overrides)
            sys.stdout.flush()
    except GradPursuitError as error:
        _say(error, error.lines)
        return error.exit_code
    except BrokenPipeError:  # who reads the output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return 141  # as of a program that the signal ends
    except OSError as error:  # the disk, wherever it fails
        place = f"{error.filename}: " if error.filename else ""
        _say(f"{place}{error.strerror or error}; finished work is kept")
        return 2
    except Exception as error:
        if os.environ.get("GRADPURSUIT_TRACEBACK"):
            raise
        _say(
            f"this should not happen: {type(error).__name__}: {error}; finished work is kept. Please report it with "
            "its traceback, which is in log.txt of the run folder, or shown if GRADPURSUIT_TRACEBACK=1 is set"
        )
        return 70  # a fault of the program, as sysexits.h numbers it
    except KeyboardInterrupt:
        print("gradpursuit: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _say(error: object, lines: Sequence[str] = ()) -> None:
    """Print one message for an error; a line break that is none between `lines` is part of a value, and written out."""
    text = "\n".join(map(shown, lines or [str(error)]))
    print(f"gradpursuit: error: {text}", file=sys.stderr)


def quickstart(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit quickstart`."""
    from gradpursuit.quickstart.job import fetch_inputs, quickstart_config

    quiet_libraries()
    config = quickstart_config(arguments.run_dir, overrides)
    _execute(arguments, config, "report", inputs=lambda: fetch_inputs(Path(str(config.run_dir))))


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit run config.yaml`."""
    from gradpursuit.opening import read_config

    quiet_libraries()
    _execute(arguments, read_config(Path(arguments.config), overrides, arguments.run_dir), "report")


def stage(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit warmup|collect|select|export|compare RUN`."""
    from gradpursuit.opening import named_config

    first, last, _ = STAGE_VERBS[arguments.name]
    if getattr(arguments, "targets", None):
        overrides = [*overrides, f"evaluation.targets={json.dumps(arguments.targets.split(','))}"]
    quiet_libraries()
    config = named_config(arguments.run, overrides, arguments.run_dir)
    if asks_for_budget(arguments):
        export_with_budget(arguments, config)
    else:
        place = ["--run-dir", arguments.run_dir] if arguments.run_dir else []
        words = [arguments.run, *place, *(f"--{override}" for override in overrides)]
        _execute(arguments, config, last, first, words=words)


def report(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit report RUN`."""
    from gradpursuit.opening import begun_config
    from gradpursuit.pipeline import Run
    from gradpursuit.report.terminal import Done

    made = Run(begun_config(arguments.run, overrides), quick=True)
    with at_work(made):
        page, data = made.report(full=arguments.full)
    done = Done(made.folder, [page, data], _view(page))
    done.print(as_json=arguments.json, quiet=arguments.quiet)


def status(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit status RUN`."""
    from gradpursuit.opening import begun_config
    from gradpursuit.pipeline import Run
    from gradpursuit.status import read_status

    found = read_status(Run(begun_config(arguments.run, overrides), quick=True))
    print(found.to_json() if arguments.json else found)


def inspect(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit inspect config.yaml`."""
    from gradpursuit.data.inspection import inspect as look
    from gradpursuit.opening import named_config
    from gradpursuit.pipeline import Run
    from gradpursuit.selection.subset import refuse_reserved_columns

    quiet_libraries()
    made = Run(named_config(arguments.config, overrides, arguments.run_dir))
    made.strategies()  # a name that nothing is known of is refused here, before anything is read
    data, holdout = made.config.data, made.config.evaluation.holdout
    found = look(data, made.renderer(), arguments.n, holdout, made.seed("holdout"), check=refuse_reserved_columns)
    if arguments.json:
        print(json_text(found.to_json()))
        return
    from gradpursuit.report.rows import print_inspection

    print_inspection(found, rich_console())


def estimate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit estimate config.yaml`."""
    from gradpursuit.estimate import estimate as measure
    from gradpursuit.opening import named_config

    quiet_libraries()
    found = measure(named_config(arguments.config, overrides, arguments.run_dir))
    if arguments.json:
        print(json_text(found.to_json()))
        return
    from gradpursuit.report.terminal import cost_table, size

    costs = {name: (cost.seconds, cost.disk) for name, cost in found.stages.items()}
    rich_console().print(cost_table(costs, found.full_training))
    memory = f"memory {size(found.memory)}" + (f", GPU memory {size(found.gpu_memory)}" if found.gpu_memory else "")
    print(f"measured on {found.compute}; {found.rows['pool']} rows of the pool, {memory}")
    print("from timed rows and steps of this data; a few seconds to start each stage are not counted")


def verify(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit verify RUN`."""
    from gradpursuit.lock import holder
    from gradpursuit.opening import run_folder
    from gradpursuit.report.terminal import check_line
    from gradpursuit.verify import verify_folder

    folder = run_folder(arguments.run, damaged=True)
    if owner := holder(folder):
        raise RunError(f"{folder}: {owner} is at work here; verify it when that is done")
    quiet_libraries()
    found = verify_folder(folder, arguments.sample, overrides)
    if arguments.json:
        print(json_text(found.to_json()))
    else:
        shown = found.unexpected[:UNEXPECTED]
        more = len(found.unexpected) - len(shown)
        notes = [f"{path}: this run did not write it" for path in shown]
        notes += [f"{folder}: and {more} more files that this run did not write"] if more else []
        print("".join(f"{line}\n" for line in (*map(check_line, found.checks), *found.outdated, *notes)), end="")
    if found.problems:
        count = f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
        raise RunError.of_lines([f"{count} in {folder}:", *found.problems])
    if not arguments.json:
        apart = "what is outdated apart, " if found.outdated else ""
        print(f"{folder}: {apart}every file is what was written, no row is missing")


def target_add(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit target add RUN --name N --file F`."""
    from gradpursuit.opening import begun_config
    from gradpursuit.pipeline import Run
    from gradpursuit.report.terminal import Done
    from gradpursuit.sources import located_path
    from gradpursuit.targets import TargetFiles, add_target

    config = begun_config(arguments.run, overrides)
    files = TargetFiles(tuple(map(located_path, arguments.file)), tuple(map(located_path, arguments.heldout)))
    quiet_libraries()
    made = Run(config)
    with at_work(made):
        target = add_target(made, arguments.name, files, replace=arguments.replace)
    following = shlex.join(["gradpursuit", "select", str(made.folder), "--selection.target", target.name])
    done = Done(target.folder, [target.folder / "data", target.folder / "gradients"], following)
    done.print(as_json=arguments.json, quiet=arguments.quiet)


def target_list(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit target list RUN`."""
    from gradpursuit.opening import begun_config
    from gradpursuit.pipeline import Run
    from gradpursuit.status import target_lines
    from gradpursuit.targets import targets

    made = Run(begun_config(arguments.run, overrides), quick=True)
    found = [target.describe() for target in targets(made)]
    if arguments.json:
        print(json_text(found))
    else:
        print("\n".join(target_lines(found)) if found else f"{made.folder}: no target was added")


def strategies(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`gradpursuit strategies`."""
    from gradpursuit.selection import describe_strategies

    found = describe_strategies()
    if arguments.json:
        print(json_text(found))
        return
    from gradpursuit.status import strategy_lines

    print("\n".join(strategy_lines(found)))


def _execute(
    arguments: argparse.Namespace,
    config: RunConfig,
    upto: str,
    first: str | None = None,
    inputs: Callable[[], None] = lambda: None,
    words: Sequence[str] = (),
) -> None:
    from gradpursuit.pipeline import Run
    from gradpursuit.report.terminal import Done

    made = Run(config, words=words)
    with at_work(made):
        inputs()
        made.execute(upto, first)
    files = made.written(first or "export", upto)
    if upto == "report":
        done = Done(made.folder, files, _view(made.folder / "report.html"), *_outcome(made))
    else:
        done = Done(made.folder, files, shlex.join(["gradpursuit", NEXT[upto], str(made.folder)]))
    done.print(as_json=arguments.json, quiet=arguments.quiet)


def _count(text: str) -> int:
    """A flag's number of things."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradpursuit", description="Pick the training examples that a target needs, jointly, by their gradients."
    )
    parser.add_argument("--version", action="version", version=f"gradpursuit {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("quickstart", help="the whole job on a small real model and real data", epilog=OVERRIDES)
    verb.add_argument("--run-dir", "--run_dir", default="runs/quickstart", help="the run folder (default: %(default)s)")
    verb.set_defaults(verb=quickstart)
    verb = verbs.add_parser("run", help="the whole job on your own files", epilog=OVERRIDES)
    verb.add_argument("config", help="the configuration, a YAML file; see examples/")
    _add_run_dir(verb)
    verb.set_defaults(verb=run)
    for name, (_first, _last, text) in STAGE_VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, epilog=OVERRIDES)
        verb.add_argument("run", metavar="RUN", help="a run folder, or a configuration that names one")
        _add_run_dir(verb)
        if name == "compare":
            verb.add_argument("--targets", metavar="A,B", help="targets that were added, and `own`: evaluation.targets")
        if name == "export":
            add_export_flags(verb)
        verb.set_defaults(verb=stage, name=name)
    text = "show how far every stage is: state, rows done, rate and time left"
    verb = verbs.add_parser("status", help=text, description=f"{text}; changes nothing", epilog=OVERRIDES)
    verb.add_argument("run", metavar="RUN", help="a run folder")
    verb.set_defaults(verb=status)
    text = "show rows as the model sees them, and what is dropped and why"
    verb = verbs.add_parser("inspect", help=text, description=f"{text}; loads no model weights", epilog=OVERRIDES)
    verb.add_argument("config", help="the configuration, a YAML file, or a run folder")
    verb.add_argument("--n", type=_count, default=5, help="rows of pool and target to show (default: %(default)s)")
    _add_run_dir(verb)
    verb.set_defaults(verb=inspect)
    text = "write report.html and report.json of a run as it is now"
    verb = verbs.add_parser("report", help=text, description=f"{text}; what is missing is said there", epilog=OVERRIDES)
    verb.add_argument("run", metavar="RUN", help="a run folder")
    verb.add_argument("--full", action="store_true", help="also what takes long with a large pool or budget")
    verb.set_defaults(verb=report)
    text = "time up to 128 rows and a few steps, and print what every stage will cost"
    verb = verbs.add_parser("estimate", help=text, description=f"{text}; leaves nothing behind", epilog=OVERRIDES)
    verb.add_argument("config", help="the configuration, a YAML file, or a run folder")
    _add_run_dir(verb)
    verb.set_defaults(verb=estimate)
    text = "list the strategies: what they follow, what they need, whether their choice depends on the seed"
    verb = verbs.add_parser("strategies", help=text, description=text)
    verb.set_defaults(verb=strategies)
    text = "check every file of a run against its sha256, find missing rows, compute some features again"
    verb = verbs.add_parser("verify", help=text, description=f"{text}; changes nothing", epilog=OVERRIDES)
    verb.add_argument("run", metavar="RUN", help="a run folder")
    verb.add_argument("--sample", type=_count, default=8, help="rows of each split to compute again (default: 8)")
    verb.set_defaults(verb=verify)
    _add_target_verbs(verbs.add_parser("target", help="add a target to a finished run, or list those it has"))
    _add_output_flags(verbs)
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    try:
        words, overrides = _split(argv)
    except ConfigError as error:
        parser.error(str(error))
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; `gradpursuit VERB --help` lists the flags of a verb, "
            "and a setting is --section.key VALUE, as in --selection.k 50"
        )
    return arguments, overrides


def _add_run_dir(verb: argparse.ArgumentParser) -> None:
    text = "the run folder (default: run_dir of the configuration, or runs/<name of the file>)"
    verb.add_argument("--run-dir", "--run_dir", metavar="FOLDER", help=text)


def _add_target_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="add|list")
    text = "compute the features of other target examples against the trajectory of a run, and nothing else"
    verb = verbs.add_parser("add", help=text, description=text)
    verb.add_argument("run", metavar="RUN", help="a run folder whose gradients are collected")
    verb.add_argument("--name", required=True, help="what selection.target is to call it")
    verb.add_argument(
        "--file", required=True, action="append", help="a file, glob or hub id of target examples; may be repeated"
    )
    verb.add_argument(
        "--heldout",
        default=[],
        action="append",
        metavar="FILE",
        help="examples for scoring only; may be repeated (default: split off from the target)",
    )
    verb.add_argument("--replace", action="store_true", help="replace a target of that name that has other content")
    verb.set_defaults(verb=target_add)
    verb = verbs.add_parser("list", help="list the targets that were added to a run")
    verb.add_argument("run", metavar="RUN", help="a run folder")
    verb.set_defaults(verb=target_list)
    _add_output_flags(verbs)


def _add_output_flags(verbs: Any) -> None:
    """Flags that every verb has."""
    for verb in verbs.choices.values():
        if verb.get_default("verb"):
            verb.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
            verb.add_argument("--quiet", "-q", action="store_true", help="show no progress and no summary")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Plain words, and the settings `--section.key VALUE` or `--section.key=VALUE` as `section.key=VALUE`."""
    words, overrides, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in SHORT:
            flag = SHORT[flag]
            word = flag + equals + value
        if not (flag.startswith("--") and "." in flag) and flag != "--seed":
            words.append(word)
        elif equals:
            overrides.append(word[2:])
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{word[2:]}={rest.pop(0)}")
        else:
            raise ConfigError(f"flag '{word}' has no value: write {word} VALUE")
    if "engine.name=local" in overrides:
        overrides.insert(0, "engine.address=null")  # of a cluster that a run was on before
    return words, overrides


def _outcome(made: Run) -> tuple[dict[str, Any], list[Any]]:
    """How the comparison came out and what it took, for machines and for people."""
    from gradpursuit.evaluation.table import to_json
    from gradpursuit.report.terminal import comparison_tables, timing_table

    lines, manifest = made.lines(), made.manifest.read()
    seconds = {name: entry["seconds"] for name, entry in manifest["stages"].items() if "seconds" in entry}
    return {"comparison": to_json(lines), "seconds": seconds}, [*comparison_tables(lines), timing_table(manifest)]


def _view(page: Path) -> str:
    """The command that opens a page in the user's browser, on any system."""
    return f"python -m webbrowser {shlex.quote(page.as_uri())}"


if __name__ == "__main__":
    sys.exit(main())
