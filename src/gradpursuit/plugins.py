"""Strategies that other distributions register as entry points, known by name and version without loading them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from gradpursuit.config import SelectionSection

GROUP = "gradpursuit.strategies"


def registered() -> dict[str, list[EntryPoint]]:
    """What is registered, by name; a name should be registered once."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if point not in same:
            same.append(point)
    return found


def distribution(point: EntryPoint) -> str:
    """Name and version of the distribution that registers it."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def used_distributions(selection: SelectionSection) -> list[str]:
    """Name and version of the distributions whose strategies may be used, sorted."""
    used = {str(options.get("selector", "")) for options in selection.options.values()}.union(selection.strategies)
    return sorted({distribution(point) for name, same in registered().items() if name in used for point in same})
