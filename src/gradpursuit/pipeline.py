"""The run: a folder, a configuration, and the stages that fill it, none of them done twice without need."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradpursuit.aside import replacing
from gradpursuit.attempt import run_stage
from gradpursuit.belongings import refuse_foreign, refuse_inputs_within
from gradpursuit.comparison_stage import targets_fingerprint
from gradpursuit.config import RunConfig, rows_of
from gradpursuit.errors import ConfigError, RunError, SelectionError
from gradpursuit.files import read_json, write_text
from gradpursuit.gradient_stage import claim_store, collected_requests, splits, store_problems
from gradpursuit.identity import model_identity
from gradpursuit.inputs import Inputs
from gradpursuit.integrity import refuse_damage, refuse_damaged_inputs, stage_damage, told
from gradpursuit.live import telling
from gradpursuit.lock import RunLock
from gradpursuit.manifest import SELECTION_FORMAT, Manifest, State, digest_of
from gradpursuit.plugins import used_distributions
from gradpursuit.sealed import is_sealed_text, sealed_text
from gradpursuit.spread import check_engine
from gradpursuit.stages import STAGES, Stage
from gradpursuit.targets import Target, refuse_unknown, targets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from gradpursuit.data import Renderer, Table
    from gradpursuit.data.limits import Limits
    from gradpursuit.evaluation.findings import Line
    from gradpursuit.selection import Selection, Settings, Strategy
    from gradpursuit.trajectory.model import Compute

logger = logging.getLogger("gradpursuit")


class Run:
    """A run folder and the configuration that fills it.

    Args:
        config: resolved; `run_dir` names the folder.
        quick: know files by name, size and time instead of reading them, as is enough to look on.
        words: how a command line that begins with a verb names this run, with its settings; empty: by its folder.
    """

    def __init__(self, config: RunConfig, *, quick: bool = False, words: Sequence[str] = ()) -> None:
        if config.run_dir is None:
            raise ConfigError("'run_dir' is missing: name the folder of the run")
        self.config, self.quick = config, quick
        self.folder = Path(config.run_dir)
        self.words = tuple(words) or (str(self.folder),)
        self.manifest = Manifest(self.folder)
        self.lock = RunLock(self.folder)
        self.inputs = Inputs(config, self.folder, self.manifest, quick=quick)

    def __reduce__(self) -> tuple[Any, tuple[RunConfig]]:
        """Sent to another machine, it is opened there anew."""
        return partial(Run, quick=self.quick), (self.config,)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Hold the lock of the folder, and tell there how far `what` is.

        Raises:
            RunError: another process holds the lock.
        """
        with self.lock, telling(self.folder, what):
            yield

    def execute(self, upto: str, first: str | None = None) -> None:
        """Run the stages from `first` (default: the very first) to `upto`, skipping those that are complete.

        Raises:
            RunError: a stage before `first` is not complete, or another process is at work in the folder.
            GradPursuitError: whatever a stage refuses; finished work is kept.
        """
        names = [stage.name for stage in STAGES]
        begin = names.index(first) if first else 0
        with self.lock:
            check(self)
            refuse_inputs_within(self)
            refuse_damaged_inputs(self)
            refuse_unknown(self, upto)
            self._restore_config()
            for stage in STAGES[begin : names.index(upto) + 1]:
                refuse_foreign(self, stage)
            if begin <= names.index("gradients") <= names.index(upto):
                claim_store(self)
            fingerprint = ""
            for number, stage in enumerate(STAGES[: names.index(upto) + 1]):
                fingerprint = self.fingerprint_of(stage, fingerprint)
                state = self.state(stage, fingerprint)
                if state == "complete":
                    if number >= begin:
                        logger.info("%s: complete, nothing to do", stage.name)
                elif number < begin:
                    self._refuse(stage, f"'{STAGES[begin].name}'")
                else:
                    with self.working(stage.name):
                        run_stage(self, stage, fingerprint, state)

    def require(self, upto: str, purpose: str, without: Collection[str] = ()) -> None:
        """See that the stages to `upto` are complete; the rows of the gradients are counted, not read.

        What the stages `without` have made need not be there any more.

        Raises:
            RunError: one is not; the command that completes it is named.
        """
        if lacking := self.missing(upto, without):
            self._refuse(lacking, purpose)

    def missing(self, upto: str, without: Collection[str] = ()) -> Stage | None:
        """The first stage up to `upto` that is not complete; the rows of the gradients are counted, not read."""
        fingerprint = ""
        for stage in STAGES[: [stage.name for stage in STAGES].index(upto) + 1]:
            fingerprint = self.fingerprint_of(stage, fingerprint)
            quick = stage.intact is not None
            if stage.name not in without and self.state(stage, fingerprint, quick=quick) != "complete":
                return stage
        return None

    def report(self, *, full: bool = False) -> list[Path]:
        """Write the report of the run as it is now; what is missing is said there.

        Args:
            full: also what takes long with a large pool or budget.

        Raises:
            RunError: not even the data are clean, or another process is at work in the folder.
        """
        from gradpursuit.report import write_report

        with self.working("report"):
            refuse_damage(self)
            refuse_foreign(self, STAGES[-1])
            with replacing(self.folder, "report", [self.folder / "manifest.json"]) as old:
                for place in self.paths(STAGES[-1].writes):
                    old.set_aside(place, copy=True)
                start, fingerprint = time.monotonic(), self.fingerprint("report")
                files = write_report(self, full=full)
                self.manifest.begin("report", fingerprint, self.config.seed)
                self.manifest.complete("report", time.monotonic() - start, {}, files)
                old.commit(())
        return files

    def written(self, first: str, upto: str) -> list[Path]:
        """Folders and files of the stages from `first` to `upto` that are there and worth naming."""
        names = [stage.name for stage in STAGES]
        found = [*STAGES[names.index(first) : names.index(upto) + 1]]
        paths = [path for stage in found for path in self.paths(stage.shows or (*stage.owns, *stage.writes))]
        return [path for path in dict.fromkeys(paths) if path.exists()]

    def added_targets(self) -> list[str]:
        """Names of the targets that were added to the run and are complete."""
        return [target.name for target in targets(self) if target.state() == "complete"]

    def _refuse(self, stage: Stage, purpose: str) -> NoReturn:
        again = shlex.join(["gradpursuit", stage.verb, *self.words])
        if lines := self.damage(stage):
            raise RunError(f"{lines}; {purpose} needs it: put it back from a copy, or run `{again}` first")
        raise RunError(
            f"{self.folder}: {purpose} needs '{stage.name}', which is not complete for this "
            f"configuration; run `{again}` first"
        )

    def damage(self, stage: Stage) -> str:
        """Which files of a stage that was finished with these settings are missing or changed; empty: none."""
        if self.state(stage, self.fingerprint(stage.name), quick=False) != "damaged":
            return ""
        if changed := stage_damage(self, stage.name):
            return told(changed, stage.name)
        return "; ".join(problem for split in splits(self) for problem in store_problems(self, split))

    def state(self, stage: Stage, fingerprint: str, *, quick: bool | None = None) -> State:
        """How far a stage is; `quick` (default: that of the run): files are known by name and size alone."""
        quick = self.quick if quick is None else quick
        state = self.manifest.state(stage.name, fingerprint, quick=quick)
        return "damaged" if state == "complete" and stage.intact and not stage.intact(self, quick) else state

    def _restore_config(self) -> None:
        """Write `config.yaml` again if it is lost or changed: these settings come from elsewhere."""
        path = self.folder / "config.yaml"
        if self.manifest.read()["stages"] and not is_sealed_text(path):
            text = sealed_text(self.config.dump())
            write_text(path, text)
            self.manifest.record_config(text)

    def paths(self, templates: tuple[str, ...]) -> list[Path]:
        """Places in the run folder by their templates, each for every configured strategy."""
        names = self.config.selection.strategies
        return [self.folder / template.format(strategy=name) for template in templates for name in names]

    def fingerprint(self, upto: str) -> str:
        """The fingerprint that stage `upto` has with this configuration and these inputs."""
        fingerprint = ""
        for stage in STAGES:
            fingerprint = self.fingerprint_of(stage, fingerprint)
            if stage.name == upto:
                break
        return fingerprint

    def fingerprint_of(self, stage: Stage, above: str) -> str:
        """sha256 over what the stage depends on: the stage above, settings, the seed, input files, an added target."""
        value = self._dependencies(stage, above)
        if stage.name == "gradients":
            value["features"] = collected_requests(self)
        return digest_of(value)

    @property
    def feature_basis(self) -> str:
        """sha256 over what features depend on, apart from which of them are wanted."""
        (stage,) = (stage for stage in STAGES if stage.name == "gradients")
        return digest_of(self._dependencies(stage, self.fingerprint("trajectory")))

    def _dependencies(self, stage: Stage, above: str) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        value: dict[str, Any] = {"above": above, "stage": stage.name, "seed": self.config.seed}
        for setting in stage.settings:
            section, _, key = setting.partition(".")
            value[setting] = config[section][key] if key else config[section]
        if stage.name == "data":
            value["inputs"] = {name: list(hashes.values()) for name, hashes in self.inputs.hashes.items()}
            value["sources"] = {name: [source.options for source in made] for name, made in self.inputs.sources.items()}
            value["model"] = self.model_identity
            if self.inputs.template:  # by its content, wherever the file lies
                value["template"] = self.inputs.template
        if stage.name == "trajectory" and self.config.warmup.trajectory:
            value["inputs"] = self.inputs.trajectory_hashes
        if stage.name == "data" and self.config.data.in_domain:
            value["in_domain"] = True
        if stage.name == "selection":
            value["format"] = SELECTION_FORMAT
            value["plugins"] = used_distributions(self.config.selection)
            value["target"] = self.target.fingerprint() if self.target else None
        if stage.name == "evaluation":
            value["targets"] = targets_fingerprint(self)
        if stage.name == "report":  # it is of the run as it is, whatever is missing there
            value["made"] = {name: made for name, made in self.manifest.finished().items() if name != "report"}
        return value

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """What tells the model from others."""
        return model_identity(self.config.model)

    @cached_property
    def target(self) -> Target | None:
        """The added target that is chosen for; None: the run's own."""
        name = self.config.selection.target
        return Target(self, name) if name else None

    def for_target(self, name: str | None) -> Run:
        """The same run, choosing for another of its targets (None: its own); what was loaded is shared."""
        selection = self.config.selection.model_copy(update={"target": name})
        other = Run(self.config.model_copy(update={"selection": selection}), quick=self.quick, words=self.words)
        shared = ("model_identity", "inputs", "compute", "base", "limits")
        vars(other).update({key: value for key, value in vars(self).items() if key in shared})
        return other

    @property
    def target_folder(self) -> Path:
        """Where `data` and `gradients` of the target that is chosen for lie."""
        return self.target.folder if self.target else self.folder

    def target_table(self, name: str) -> Table:
        """The cleaned `target` or `heldout` rows of the target that is chosen for."""
        from gradpursuit.data import Table

        return Table.read(self.target_folder / "data" / f"{name}.parquet")

    def candidates(self) -> NDArray[np.int64]:
        """Positions of the pool rows that may be chosen: all, but those that repeat a row of an added target."""
        import numpy as np

        from gradpursuit.data import left_out

        ids = self.table("pool").ids
        ruled_out = left_out(self.target_folder / "data") if self.target else set()
        return np.array([i for i, name in enumerate(ids) if name not in ruled_out], dtype=np.int64)

    @cached_property
    def compute(self) -> Compute:
        """Device and precision."""
        from gradpursuit.trajectory.model import Compute

        made = Compute.of(self.config.model)
        logger.info("computing on %s", made)
        return made

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, loaded once."""
        from gradpursuit.trajectory.model import load_model

        return load_model(self.config.model).to(self.compute.device)  # type: ignore[arg-type]

    def table(self, name: str) -> Table:
        """The cleaned `pool`, `target` or `heldout`."""
        from gradpursuit.data import Table

        return Table.read(self.folder / "data" / f"{name}.parquet")

    @cached_property
    def settings(self) -> Settings:
        """What the strategies go by."""
        from gradpursuit.selection import Settings

        return Settings(self.config.gradients, self.config.pursuit, self.config.selection.options)

    def renderer(self) -> Renderer:
        """Renders rows as the model's tokenizer does, supervised as the configuration says."""
        from gradpursuit.data import Renderer
        from gradpursuit.trajectory.model import load_tokenizer

        data = self.config.data
        tokenizer = load_tokenizer(self.config.model)
        return Renderer(tokenizer, data.turns, data.chat_template_kwargs, self.limits, data.chat_template)

    @cached_property
    def limits(self) -> Limits:
        """What the model can take of a row.

        Raises:
            ModelError: its settings cannot be read.
            ConfigError: `data.max_tokens` allows rows that change what the model makes of others.
        """
        from gradpursuit.trajectory.limits import load_limits

        return load_limits(self.config.model, self.config.data.max_tokens)

    def strategies(self) -> list[Strategy]:
        """The configured strategies."""
        return [self.settings.strategy(name) for name in self.config.selection.strategies]

    @property
    def in_domain(self) -> bool:
        """Whether what is chosen for is the pool itself."""
        return self.config.data.in_domain and self.target is None

    def seed(self, use: str) -> int:
        """The seed for one use."""
        from gradpursuit.selection import derive_seed

        return derive_seed(self.config.seed, use)

    def budget(self, pool: Table) -> int:
        """k: as given, or the fraction of the pool rounded up, or 5 % of it.

        Raises:
            SelectionError: k is larger than the pool.
        """
        selection = self.config.selection
        k = selection.k or rows_of(selection.fraction or 0.05, len(pool))
        if k > len(pool):
            raise SelectionError(
                f"selection.k = {k}, but the cleaned pool has only {len(pool)} examples; choose a smaller k"
            )
        return k

    def selections(self) -> dict[str, list[Selection]]:
        """Every strategy's selection, one or more draws each."""
        from gradpursuit.selection.export import read_selection

        pool = self.table("pool")
        return {
            name: read_selection(self.folder / "selection" / name, pool) for name in self.config.selection.strategies
        }

    def lines(self) -> list[Line]:
        """The comparison table.

        Raises:
            RunError: the comparison has not been run.
        """
        from gradpursuit.evaluation.table import from_json

        path = self.folder / "evaluation" / "summary.json"
        if not path.is_file():
            command = shlex.join(["gradpursuit", "compare", str(self.folder)])
            raise RunError(f"{self.folder}: nothing has been compared yet; run `{command}`")
        return from_json(read_json(path))


def check(run: Run) -> None:
    """Refuse early what can be known before any work: strategies, the device, a trajectory that was given.

    Raises:
        ConfigError: with the offending value.
        TrajectoryError: the given trajectory is not there, or its adapter cannot be followed.
    """
    from gradpursuit.selection import check_strategies
    from gradpursuit.trajectory.model import Compute

    config = run.config
    check_strategies(config)
    check_engine(config)
    Compute.of(config.model)
    if config.warmup.trajectory and not run.inputs.trajectory_is_gone:
        from gradpursuit.trajectory.imported import check_trajectory

        check_trajectory(config)
