"""Strategies behind one small interface, their selections, and the export."""

from gradpursuit.selection.base import STRATEGIES, Selection, SelectionProblem, Strategy, derive_seed, strategy

__all__ = ["STRATEGIES", "Selection", "SelectionProblem", "Strategy", "derive_seed", "strategy"]
