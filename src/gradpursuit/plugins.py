"""The names of strategies, this package's own and those that others register as entry points, without loading any."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from gradpursuit.config import SelectionSection

GROUP = "gradpursuit.strategies"
STRATEGIES = {
    "gtp": "gradpursuit.selection.gtp:GTP",
    "omp": "gradpursuit.selection.omp:OMP",
    "gradmatch": "gradpursuit.selection.gradmatch:GradMatch",
    "less": "gradpursuit.selection.less:LESS",
    "topk": "gradpursuit.selection.topk:TopK",
    "tracin": "gradpursuit.selection.tracin:TracIn",
    "bids": "gradpursuit.selection.bids:BIDS",
    "tarot": "gradpursuit.selection.tarot:TAROT",
    "rds": "gradpursuit.selection.rds:RDS",
    "dsir": "gradpursuit.selection.dsir:DSIR",
    "el2n": "gradpursuit.selection.el2n:EL2N",
    "grand": "gradpursuit.selection.grand:GraNd",
    "learning-percentage": "gradpursuit.selection.learning_percentage:LearningPercentage",
    "kmeans-quality": "gradpursuit.selection.kmeans_quality:KMeansQuality",
    "random": "gradpursuit.selection.random:Random",
    "random-matched": "gradpursuit.selection.random_matched:RandomMatched",
}


def registered() -> dict[str, list[EntryPoint]]:
    """What is registered, by name; a name should be registered once."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if point not in same:
            same.append(point)
    return found


def foreign() -> dict[str, list[EntryPoint]]:
    """What is registered under names that are free: this package's own are taken."""
    return {name: points for name, points in registered().items() if name not in STRATEGIES}


def distribution(point: EntryPoint) -> str:
    """Name and version of the distribution that registers it."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def used_distributions(selection: SelectionSection) -> list[str]:
    """Name and version of the distributions whose strategies may be used, sorted."""
    used = {str(options.get("selector", "")) for options in selection.options.values()}.union(selection.strategies)
    return sorted({distribution(point) for name, same in foreign().items() if name in used for point in same})
