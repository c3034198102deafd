"""A callback that makes a training run leave its trajectory behind: the warm-up's, and any run of your own."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gradpursuit.errors import ConfigError, TrajectoryError
from gradpursuit.files import require_space
from gradpursuit.trajectory.checkpoint import write_checkpoint
from gradpursuit.trajectory.followed import followed_layers
from gradpursuit.trajectory.model import trainable
from gradpursuit.trajectory.optimizer import live_state, refuse_foreign_optimizer

logger = logging.getLogger("gradpursuit")


class GradientTrajectoryCallback(TrainerCallback, ExportableState):
    """Leaves a trajectory that `warmup.trajectory` can point to, out of a run of `transformers.Trainer` or of TRL.

    `Trainer(..., callbacks=[GradientTrajectoryCallback("trajectory", checkpoints=3)])` writes `checkpoint-1` ...
    `checkpoint-T` to that folder, evenly spaced over the run's optimizer steps, the last one at its end; each holds
    the trained weights, the optimizer's moments and the mean learning rate of the steps since the one before. A run
    that is resumed from a checkpoint of the Trainer goes on with its trajectory. Only the main process writes.

    Args:
        output_dir: of the trajectory alone; not the Trainer's own.
        checkpoints: T.

    Raises:
        ConfigError: at the beginning of training: the folder is in use, or there are fewer steps than checkpoints.
        ModelError: at the beginning of training: what is trained cannot be followed (only LoRA on linear layers, or
            the weights of linear layers, can).
        TrajectoryError: at the beginning, a run whose earlier steps were not followed, or that is sharded by FSDP or
            DeepSpeed; after the first step, an optimizer without Adam's moments.
    """

    def __init__(self, output_dir: str | Path, checkpoints: int = 3) -> None:
        if checkpoints < 1:
            raise ConfigError(f"GradientTrajectoryCallback: checkpoints = {checkpoints}; at least one is needed")
        self._folder, self._count = Path(output_dir), checkpoints
        self._checked = self._moved = False
        self._rate = 0.0
        self.progress: dict[str, Any] = {}  # what a resumed run needs to know; kept in trainer_state.json

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps of this callback."""
        arguments = {"output_dir": str(self._folder), "checkpoints": self._count}
        return {"args": arguments, "attributes": {"progress": dict(self.progress)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work before hours are spent on it."""
        model = _bare(model)
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None) or _is_sharded(model):
            raise TrajectoryError(
                "GradientTrajectoryCallback: the optimizer's moments are sharded (FSDP or DeepSpeed); of an FSDP run, "
                "give the Trainer's own checkpoint folders to warmup.trajectory instead"
            )
        followed_layers(model)  # refuses what cannot be followed
        if state.max_steps < self._count:
            raise ConfigError(
                f"GradientTrajectoryCallback: checkpoints = {self._count}, but the run has only {state.max_steps} "
                "steps; ask for fewer checkpoints or train longer"
            )
        targets = [round(state.max_steps * t / self._count) for t in range(1, self._count + 1)]
        self._checked = False
        if state.global_step:
            self._resume(state, targets)
        else:
            self._begin(args, targets)
        size = sum(parameter.numel() for parameter in trainable(model).values())
        require_space(self._folder, 12 * size * self._count, "the trajectory")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate that the step used, before the schedule moves on."""
        optimizer = kwargs["optimizer"]
        self._moved = not getattr(optimizer, "step_was_skipped", False)  # float16 leaves out steps that overflow
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write a checkpoint where one is due."""
        model, optimizer = _bare(model), kwargs["optimizer"]
        total, count = self.progress["rates"]
        if self._moved:
            total, count = total + self._rate, count + 1
            if not self._checked:
                refuse_foreign_optimizer(model, optimizer)
                self._checked = True
        self.progress["rates"] = [total, count]
        if state.global_step not in self.progress["targets"]:
            return
        if not count:
            raise TrajectoryError(f"{self._folder}: no optimizer step succeeded since the checkpoint before this one")
        self.progress["rates"] = [0.0, 0]
        if state.is_world_process_zero:
            number = self.progress["targets"].index(state.global_step) + 1
            folder = self._folder / f"checkpoint-{number}"
            write_checkpoint(folder, model, live_state(model, optimizer), total / count)
            logger.debug("%s: written after step %d", folder, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say when the run was stopped before its last checkpoint."""
        missing = [t for t in self.progress["targets"] if t > state.global_step]
        if missing:
            logger.warning(
                "%s: training stopped at step %d of %d: %d of %d checkpoints were not written",
                self._folder, state.global_step, state.max_steps, len(missing), self._count,
            )  # fmt: skip

    def _begin(self, args: Any, targets: list[int]) -> None:
        if self._folder.resolve() == Path(args.output_dir).resolve():
            raise ConfigError(
                f"GradientTrajectoryCallback: output_dir '{self._folder}' is the Trainer's own, where its checkpoints "
                "have names of the same kind; give a folder of its own"
            )
        if any(re.fullmatch(r"checkpoint-\d+", path.name) for path in self._folder.glob("checkpoint-*")):
            raise ConfigError(
                f"GradientTrajectoryCallback: '{self._folder}' already holds checkpoints; move them away or give "
                "another folder"
            )
        self.progress = {"targets": targets, "rates": [0.0, 0]}

    def _resume(self, state: Any, targets: list[int]) -> None:
        """Go on where the Trainer's checkpoint was made; checkpoints made after it are written again."""
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        kept = kept[0] if isinstance(kept, list) else kept
        progress = (kept or {}).get("attributes", {}).get("progress", {})
        if progress.get("targets") != targets:
            was = f"with checkpoints at steps {progress['targets']}" if progress else "without this callback"
            raise TrajectoryError(
                f"GradientTrajectoryCallback: the run goes on at step {state.global_step}, and was trained up to there "
                f"{was}; checkpoints at steps {targets} are wanted. Train from the beginning, or as before"
            )
        done = sum(target <= state.global_step for target in targets)
        lost = [t for t in range(1, done + 1) if not (self._folder / f"checkpoint-{t}" / "state.json").is_file()]
        if lost and state.is_world_process_zero:
            raise TrajectoryError(
                f"{self._folder}: checkpoint-{lost[0]} is not there, though the run goes on at step "
                f"{state.global_step}, after it; give the folder that it was written to, or train from the beginning"
            )
        self.progress = {**progress}


def _bare(model: Any) -> Any:
    """The model without what accelerate or torch.compile put around it."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def _is_sharded(model: Any) -> bool:
    kinds = {type(module).__name__ for module in model.modules()}
    parameters = trainable(model).values()
    return "FullyShardedDataParallel" in kinds or any(
        hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in parameters
    )
