"""What a report says of the data and of the chosen rows: everything that needs no gradient."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.report.absent import AbsentError
from gradpursuit.report.texts import FIELDS, blocks
from gradpursuit.selection import Selection
from gradpursuit.selection.export import copies_chosen
from gradpursuit.sources import short_names

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run

Selections = Mapping[str, Sequence[Selection]]
SHOWN_ROWS = 500
_KINDS = (2, 30)  # a column of the pool with so many different values is shown as a mix
_MIXES = 3  # such columns that are shown
_NAMED = 5  # dropped ids that are named for each reason
_SHIFT, _CERTAIN = 1.15, 0.01  # a shift of lengths: medians that differ by so much, at this p-value


def asked(run: Run) -> dict[str, Any]:
    """Model, target, budget and the settings of the run."""
    config = run.config
    return {
        "run": str(run.folder),
        "model": config.model.path,
        "target": config.selection.target,
        "strategies": list(config.selection.strategies),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
    }


def cleaning(run: Run) -> dict[str, Any]:
    """Rows kept of every split, and what was dropped, by reason, with the first ids."""
    detail = run.manifest.entry("data").get("detail", {})
    rows = {**detail.get("rows", {}), **(run.target.describe()["rows"] if run.target else {})}
    folders = dict.fromkeys((run.folder, run.target_folder))
    files = [folder / part / "dropped.jsonl" for folder in folders for part in ("data", "gradients")]
    found: dict[tuple[str, str], list[str]] = {}
    for record in (record for path in files for record in _records(path)):
        found.setdefault((record["split"], record["reason"]), []).append(str(record["id"]))
    dropped = [
        {"split": split, "reason": reason, "rows": len(ids), "first": ids[:_NAMED]}
        for (split, reason), ids in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return {"rows": rows, "distinct": detail.get("distinct"), "dropped": dropped}


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def mixes(pool: Table, selections: Selections) -> list[dict[str, Any]]:
    """Shares of the pool and of every strategy's rows: by source, and by the user's columns that have few values."""
    names = source_names(pool)
    found = [_mix("source", [names[source] for source in pool.column("source")], selections)]
    columns = [row.columns for row in pool]
    first = columns[0] if columns else {}
    for name in [name for name, value in first.items() if isinstance(value, str) and name not in FIELDS]:
        values = [str(row.get(name, "")) for row in columns]
        if _KINDS[0] <= len(set(values)) <= _KINDS[1] and len(found) <= _MIXES:
            found.append(_mix(name, values, selections))
    return found


def source_names(pool: Table) -> dict[str, str]:
    """Of the pool's sources, as people read them."""
    return short_names(zip(pool.column("source"), pool.column("file"), strict=True))


def _mix(name: str, values: list[str], selections: Selections) -> dict[str, Any]:
    before = Counter(values)
    chosen = {strategy: Counter(values[i] for i in draws[0].indices.tolist()) for strategy, draws in selections.items()}
    return {
        "by": name,
        "values": [
            {
                "value": value,
                "pool": count,
                "chosen": {strategy: counts[value] for strategy, counts in chosen.items()},
            }
            for value, count in before.most_common()
        ],
    }


def lengths(pool: Table, selections: Selections) -> dict[str, Any]:
    """Tokens of the pool's rows and of the chosen ones, and whether the choice has shifted them."""
    every = {
        "tokens": np.array([len(row.input_ids) for row in pool]),
        "supervised tokens": np.array([sum(label != IGNORE for label in row.labels) for row in pool]),
    }
    return {
        name: {
            "pool": _quantiles(counts),
            "chosen": {strategy: _shift(counts, draws[0]) for strategy, draws in selections.items()},
            "histogram": _histogram(counts, selections),
        }
        for name, counts in every.items()
    }


def _quantiles(counts: NDArray[np.int64]) -> dict[str, float]:
    low, median, high = np.quantile(counts, [0.1, 0.5, 0.9]).tolist()
    return {"p10": low, "median": median, "p90": high, "mean": float(counts.mean())}


def _shift(counts: NDArray[np.int64], selection: Selection) -> dict[str, Any]:
    """Two-sample Kolmogorov-Smirnov test of the chosen rows beside the pool, and the verdict."""
    chosen = counts[selection.indices]
    test = ks_2samp(counts, chosen)
    quantiles = _quantiles(chosen)
    ratio = (quantiles["median"] + 1) / (np.median(counts) + 1)
    shifted = test.pvalue < _CERTAIN and max(ratio, 1 / ratio) >= _SHIFT
    return {**quantiles, "distance": float(test.statistic), "p": float(test.pvalue), "shifted": bool(shifted)}


def _histogram(counts: NDArray[np.int64], selections: Selections) -> dict[str, Any]:
    """Shares of rows in bins that grow geometrically, as lengths do."""
    low, high = int(counts.min()), int(counts.max())
    edges = np.unique(np.round(np.geomspace(low + 1, high + 2, 17)).astype(np.int64) - 1)
    share = lambda values: (np.histogram(values, edges)[0] / max(1, len(values))).tolist()  # noqa: E731
    chosen = {name: share(counts[draws[0].indices]) for name, draws in selections.items()}
    return {"edges": edges.tolist(), "pool": share(counts), "chosen": chosen}


def weights(selection: Selection) -> dict[str, Any]:
    """How unevenly the weights are spread over the chosen rows."""
    falling = np.sort(selection.weights)[::-1]
    share = np.cumsum(falling) / falling.sum()
    tenth = max(1, round(0.1 * len(falling)))
    return {
        "examples": len(falling),
        "effective": float(falling.sum() ** 2 / (falling**2).sum()),
        "largest": float(falling[0]),
        "smallest": float(falling[-1]),
        "top_tenth": {"rows": tenth, "share": float(share[tenth - 1])},
        "falling": falling.tolist(),
    }


def budgets(selection: Selection, strategy: str) -> dict[str, Any]:
    """Relative residual against budget, and the knee.

    Raises:
        AbsentError: the strategy is no pursuit.
    """
    evidence = selection.evidence
    if "budgets" not in evidence:
        raise AbsentError(f"'{strategy}' ranks rows one by one: it has no path of budgets")
    return {
        "strategy": strategy,
        "path": evidence["budgets"],
        "knee": evidence["knee"],
        "passes": evidence["path"],
    }


def strategies(run: Run, pool: Table, selections: Selections) -> list[dict[str, Any]]:
    """One line for each: rows, effective rows, copies, rows by layer; on a cluster what was moved, by pass."""
    random = {strategy.name: strategy.stochastic for strategy in run.strategies()}
    return [
        {
            "strategy": name,
            "examples": len(draws[0].indices),
            "effective": weights(draws[0])["effective"],
            "copies": copies_chosen(draws[0], pool),
            "layers": [int((draws[0].layers == n).sum()) for n in range(1, int(draws[0].layers.max()) + 1)],
            "random": random[name],
            "stop_reason": list(dict.fromkeys(draws[0].evidence.get("stop_reason", []))),
            **{part: draws[0].evidence[part] for part in ("traffic", "two_level") if part in draws[0].evidence},
        }
        for name, draws in selections.items()
    ]


def chosen_rows(pool: Table, selection: Selection, strategy: str) -> dict[str, Any]:
    """The first of the chosen rows with rank, weight, layer and text."""
    names = source_names(pool)
    rows = [
        {
            "rank": rank + 1,
            **described(pool[index], names),
            "weight": float(selection.weights[rank]),
            "layer": int(selection.layers[rank]),
            "blocks": blocks(pool[index].columns),
        }
        for rank, index in enumerate(selection.indices.tolist()[:SHOWN_ROWS])
    ]
    return {"strategy": strategy, "chosen": len(selection.indices), "rows": rows}


def described(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """Identity and lengths of a row, with the name of its source."""
    supervised = sum(label != IGNORE for label in row.labels)
    return {"id": row.id, "source": names[row.source], "tokens": len(row.input_ids), "supervised": supervised}


def timings(run: Run) -> list[dict[str, Any]]:
    """Seconds, and when it was begun, of every finished stage, and whether it is outdated."""
    return [
        {
            "stage": name,
            "seconds": entry["seconds"],
            "started": entry.get("started"),
            "outdated": name != "report" and entry.get("fingerprint") != run.fingerprint(name),
            "parts": entry["detail"].get("seconds", {}),
        }
        for name, entry in run.manifest.read()["stages"].items()
        if entry.get("state") == "complete"
    ]


def provenance(run: Run) -> dict[str, Any]:
    """Versions, machine, and the hashes that tell inputs, stages and selections from others."""
    manifest = run.manifest.read()
    stages = manifest["stages"]
    outputs = {**stages.get("selection", {}).get("outputs", {}), **stages.get("export", {}).get("outputs", {})}
    inputs = stages.get("data", {}).get("detail", {}).get("inputs", {})
    return {
        "created": manifest["created"],
        "gradpursuit": manifest.get("gradpursuit"),
        "packages": manifest.get("packages", {}),
        "machine": manifest.get("machine", {}),
        "compute": stages.get("trajectory", {}).get("detail", {}).get("compute"),
        "checkpoints": stages.get("trajectory", {}).get("detail", {}).get("checkpoints", []),
        "inputs": {path: digest for hashes in inputs.values() for path, digest in hashes.items()},
        "stages": {name: entry["fingerprint"] for name, entry in stages.items() if entry.get("fingerprint")},
        "selections": {name: digest for name, digest in outputs.items() if name.endswith((".parquet", ".jsonl"))},
    }
