"""Strategies that other distributions register as entry points, known by name and version without loading them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

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
