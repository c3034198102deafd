"""The run: a folder, a configuration, and the stages that fill it, none of them done twice without need."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.config import RunConfig
from gradpursuit.errors import ConfigError, ModelError, RunError, SelectionError
from gradpursuit.files import sha256_of, write_text
from gradpursuit.manifest import Manifest, State
from gradpursuit.stages import STAGES, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gradpursuit.data import Table
    from gradpursuit.evaluation.table import Line
    from gradpursuit.selection import Selection, Strategy
    from gradpursuit.trajectory.model import Compute

logger = logging.getLogger("gradpursuit")


class Run:
    """A run folder and the configuration that fills it.

    Args:
        config: resolved; `run_dir` names the folder.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.run_dir is None:
            raise ConfigError("'run_dir' is missing: name the folder of the run")
        self.config = config
        self.folder = Path(config.run_dir)
        self.manifest = Manifest(self.folder)

    def execute(self, upto: str, first: str | None = None) -> None:
        """Run the stages from `first` (default: the very first) to `upto`, skipping those that are complete.

        Raises:
            RunError: a stage before `first` is not complete.
            GradPursuitError: whatever a stage refuses; finished work is kept.
        """
        names = [stage.name for stage in STAGES]
        begin = names.index(first) if first else 0
        check(self.config)
        fingerprint = ""
        for number, stage in enumerate(STAGES[: names.index(upto) + 1]):
            fingerprint = self._fingerprint(stage, fingerprint)
            state = self._state(stage, fingerprint)
            if state == "complete":
                if number >= begin:
                    logger.info("%s: complete, nothing to do", stage.name)
            elif number < begin:
                raise RunError(
                    f"{self.folder}: '{STAGES[begin].name}' needs '{stage.name}', which is not complete for this "
                    f"configuration; run `gradpursuit {stage.verb} {self.folder}` first"
                )
            else:
                self._run_stage(stage, fingerprint, state)

    def _state(self, stage: Stage, fingerprint: str) -> State:
        state = self.manifest.state(stage.name, fingerprint)
        return "damaged" if state == "complete" and stage.intact and not stage.intact(self) else state

    def _run_stage(self, stage: Stage, fingerprint: str, state: State) -> None:
        if state in ("outdated", "damaged"):
            reason = "settings or inputs have" if state == "outdated" else "a file of it is missing or has"
            logger.warning("%s: %s changed, it is made anew", stage.name, reason)
        if stage.keep == "never" or (stage.keep == "unfinished" and state != "unfinished"):
            for path in self._paths(stage.owns):
                shutil.rmtree(path, ignore_errors=True)
        write_text(self.folder / "config.yaml", self.config.dump())
        self.manifest.begin(stage.name, fingerprint, self.config.seed)
        start = time.monotonic()
        detail = self._work(stage)
        self.manifest.complete(stage.name, time.monotonic() - start, detail, self._outputs(stage))

    def _outputs(self, stage: Stage) -> list[Path]:
        """The files of a finished stage; none if it checks them itself."""
        owned = [] if stage.intact else [path for folder in self._paths(stage.owns) for path in folder.rglob("*")]
        return sorted({path for path in [*owned, *self._paths(stage.writes)] if path.is_file()})

    def _work(self, stage: Stage) -> dict[str, Any]:
        import torch

        try:
            return stage.work(self)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelError(
                f"{stage.name}: out of memory on {self.compute.device}; lower gradients.tokens_per_batch, "
                "warmup.batch_size, evaluation.batch_size or data.max_tokens, and run again: finished work is kept"
            ) from error

    def _paths(self, templates: tuple[str, ...]) -> list[Path]:
        names = self.config.selection.strategies
        return [self.folder / template.format(strategy=name) for template in templates for name in names]

    def _fingerprint(self, stage: Stage, above: str) -> str:
        """sha256 over what the stage depends on: the stage above, settings, the seed, input files."""
        config = self.config.model_dump(mode="json")
        value: dict[str, Any] = {"above": above, "stage": stage.name, "seed": self.config.seed}
        for setting in stage.settings:
            section, _, key = setting.partition(".")
            value[setting] = config[section][key] if key else config[section]
        if stage.name == "data":
            from gradpursuit.trajectory.model import model_identity

            value["inputs"] = list(self.input_hashes.values())
            value["model"] = model_identity(self.config.model)
        if stage.name == "trajectory" and self.config.warmup.trajectory:
            value["inputs"] = self.trajectory_hashes
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @cached_property
    def input_hashes(self) -> dict[str, str]:
        """sha256 of every input file."""
        data = self.config.data
        return {path: sha256_of(Path(path)) for path in [*data.pool, *data.target, *data.heldout]}

    @cached_property
    def trajectory_hashes(self) -> dict[str, str]:
        """sha256 of every file of the trajectory that the run was given."""
        from gradpursuit.trajectory.imported import trajectory_hashes

        return trajectory_hashes(self.config.warmup.trajectory)

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

    def strategies(self) -> list[Strategy]:
        """The configured strategies."""
        from gradpursuit.selection import strategy

        return [strategy(name) for name in self.config.selection.strategies]

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
        k = selection.k or math.ceil((selection.fraction or 0.05) * len(pool))
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
        from gradpursuit.evaluation.compare import read_cells
        from gradpursuit.evaluation.table import tabulate

        cells = read_cells(self.folder / "evaluation" / "results.jsonl")
        if not cells:
            raise RunError(f"{self.folder}: nothing has been compared yet; run `gradpursuit compare {self.folder}`")
        return tabulate(cells, self.selections(), self.table("pool"))


def check(config: RunConfig) -> None:
    """Refuse early what can be known before any work: strategies, the device, a trajectory that was given.

    Raises:
        ConfigError: with the offending value.
        TrajectoryError: the given trajectory is not there, or its adapter cannot be followed.
    """
    from gradpursuit.selection import strategy
    from gradpursuit.trajectory.model import Compute

    for name in config.selection.strategies:
        strategy(name)
    Compute.of(config.model)
    if config.warmup.trajectory:
        from gradpursuit.trajectory.imported import check_trajectory

        check_trajectory(config)
