"""Strategies behind one small interface, their selections, and the export."""

from gradpursuit.selection.base import Method, Needs, Selection, SelectionProblem, Settings, derive_seed
from gradpursuit.selection.registry import (
    STRATEGIES,
    Strategy,
    check_strategies,
    describe_strategies,
    strategy,
)

__all__ = [
    "STRATEGIES",
    "Method",
    "Needs",
    "Selection",
    "SelectionProblem",
    "Settings",
    "Strategy",
    "check_strategies",
    "derive_seed",
    "describe_strategies",
    "strategy",
]
