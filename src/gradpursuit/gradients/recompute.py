"""Stored features against features computed again, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradpursuit.data import Table
from gradpursuit.gradients.filling import KindT, StoreFiller
from gradpursuit.progress import Progress
from gradpursuit.store import GradientStore


@dataclass(frozen=True)
class Difference:
    """One row at one checkpoint: `lost` is 1 - cos of its stored feature and a new one; NaN: there is no new one.

    Of a feature that is a single number it is the relative difference.
    """

    checkpoint: int
    id: str
    lost: float


def recompute(
    collector: StoreFiller[KindT],
    name: str,
    table: Table,
    stores: Mapping[KindT, GradientStore],
    sample: int,
    seed: int,
) -> dict[str, list[Difference]]:
    """Compute a random sample of stored rows again, each in a batch of its own.

    Args:
        collector: of the run, whose settings the stores were made with.
        name: of the split, for progress.
        table: the rows of the stores.
        stores: what was stored, by kind of feature.
        sample: rows to draw; each is computed at one random checkpoint, and compared with all stores.
        seed: of the draw.

    Returns:
        The differences, by label of the kind.
    """
    kinds = list(stores)
    kept = next(iter(stores.values())).kept()
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(kept, min(sample, len(kept)), replace=False))
    checkpoints = rng.integers(next(iter(stores.values())).spec.checkpoints, size=len(rows))
    found: dict[str, list[Difference]] = {kind.label: [] for kind in kinds}
    with Progress(f"recompute {name}", len(rows)) as progress:
        for t in np.unique(checkpoints).tolist():
            engine = collector.at(t, kinds)
            for i in rows[checkpoints == t].tolist():
                again = engine.compute([table[i]], progress.update)
                for kind, new in zip(kinds, again.kinds, strict=True):
                    stored = _stored(stores[kind], t, i)
                    fresh = new.features.double().numpy()
                    lost = _lost(stored, fresh[0]) if len(fresh) else float("nan")
                    found[kind.label].append(Difference(t + 1, table[i].id, lost))
    return found


def worst(differences: Sequence[Difference]) -> Difference:
    """The largest difference; a row that has no feature any more is larger than all."""
    return max(differences, key=lambda found: (np.isnan(found.lost), found.lost))


def _stored(store: GradientStore, checkpoint: int, row: int) -> NDArray[np.float64]:
    """The feature of one row of the table, decoded: [d]."""
    shard = store.read(checkpoint, row // store.spec.shard_rows)
    place = int(np.searchsorted(shard.row, row))
    feature = np.asarray(shard.features[place], dtype=np.float64)
    return feature if shard.scale is None else feature * float(shard.scale[place])


def _lost(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) == 1:
        return float(abs(a[0] - b[0]) / max(abs(a[0]), abs(b[0])))
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
