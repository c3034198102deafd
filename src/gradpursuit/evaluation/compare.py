"""Fine-tune the model anew on every subset, with the same steps and seeds, and score held-out target examples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gradpursuit.config import EvaluationSection
from gradpursuit.data import Table
from gradpursuit.errors import RunError
from gradpursuit.files import write_text
from gradpursuit.progress import Progress
from gradpursuit.selection import Selection, derive_seed
from gradpursuit.trajectory.loss import SupervisedLoss, collate, token_batches
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.training import TrainSpec, train

logger = logging.getLogger("gradpursuit")
BASE = "base"  # the model before any fine-tuning
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run and its score.

    Attributes:
        strategy: whose subset, or `base` for the untouched model.
        seed: number of the run, from 0; `base` has only 0.
        examples: distinct rows trained on.
        steps: optimizer steps.
        loss: mean over held-out examples of the mean negative log-likelihood of their supervised tokens.
        seconds: of training and scoring.
    """

    strategy: str
    seed: int
    examples: int
    steps: int
    loss: float
    seconds: float


class Comparison:
    """The cells strategies × seeds, each computed once and kept in `results.jsonl`.

    Args:
        tuned: makes, from a seed, the model to fine-tune, fresh for each run; outside the block it is gone again.
        compute: device and precision.
        pool: rows that the selections index.
        heldout: rows scored, never trained on.
        config: seeds, epochs, batch size, learning rate, use of weights.
        seed: of the whole run; adapters and orders derive from it, the same for every strategy.
    """

    def __init__(
        self,
        tuned: Callable[[int], AbstractContextManager[nn.Module]],
        compute: Compute,
        pool: Table,
        heldout: Table,
        config: EvaluationSection,
        seed: int,
    ) -> None:
        self._tuned, self._compute = tuned, compute
        self._pool, self._heldout, self._config, self._seed = pool, heldout, config, seed

    def run(self, selections: Mapping[str, Sequence[Selection]], k: int, path: Path) -> list[Cell]:
        """All cells, those in `path` taken from there.

        Args:
            selections: the draws of each strategy; run s trains on draw s, or on the only one.
            k: the budget; it fixes the optimizer steps, so that all strategies train equally long.
            path: `results.jsonl`, rewritten after every cell.
        """
        cells = read_cells(path)
        done = {(cell.strategy, cell.seed) for cell in cells}
        wanted = [(BASE, 0)] + [(name, s) for s in range(self._config.seeds) for name in selections]
        for name, s in wanted:
            if (name, s) in done:
                continue
            draws = selections.get(name)
            cells.append(self._cell(name, s, draws[s % len(draws)] if draws else None, k))
            write_text(path, "".join(json.dumps(asdict(cell)) + "\n" for cell in cells))
            logger.info("%s, seed %d: held-out loss %.4f", name, s, cells[-1].loss)
        return cells

    def _cell(self, name: str, s: int, selection: Selection | None, k: int) -> Cell:
        config, start = self._config, time.monotonic()
        seed = derive_seed(self._seed, f"evaluation-{s}")
        steps = 0
        with self._tuned(seed) as model:
            if selection is not None:
                what = f"fine-tune on {name}, seed {s}"
                spec = TrainSpec.for_epochs(k, config.epochs, config.batch_size, config.learning_rate, seed, what)
                weights = selection.weights.tolist() if config.use_weights else None
                train(model, self._pool.take(selection.indices.tolist()), spec, self._compute, weights=weights)
                steps = spec.steps
            loss = heldout_loss(model, self._heldout, self._compute, f"score {name}, seed {s}")
        examples = 0 if selection is None else len(selection.indices)
        return Cell(name, s, examples, steps, loss, round(time.monotonic() - start, 3))


def heldout_loss(model: nn.Module, rows: Table, compute: Compute, what: str = "score") -> float:
    """Mean over `rows` of the mean negative log-likelihood of their supervised tokens, in nats per token."""
    scorer, total = SupervisedLoss(model, compute), 0.0
    pad = int(model.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
    model.eval()
    with torch.inference_mode(), Progress(what, len(rows)) as progress:
        for indices in token_batches([len(row.input_ids) for row in rows], _TOKENS_PER_BATCH):
            nll, _tokens = scorer(collate([rows[i] for i in indices], pad))
            total += float(nll.double().sum())
            progress.update(len(indices))
    return total / len(rows)


def read_cells(path: Path) -> list[Cell]:
    """The cells of a `results.jsonl`; none if there is no such file.

    Raises:
        RunError: the file is broken.
    """
    if not path.is_file():
        return []
    try:
        return [Cell(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: not a results file ({error}); delete it and compare again") from None
