"""The gradient store: shards, manifest, integrity, memory-mapped reads (format version 1)."""

from gradpursuit.store.encoding import DTYPES, Block
from gradpursuit.store.shards import Shard
from gradpursuit.store.spec import StoreSpec
from gradpursuit.store.store import GradientStore, Problem, ShardState

__all__ = ["DTYPES", "Block", "GradientStore", "Problem", "Shard", "ShardState", "StoreSpec"]
