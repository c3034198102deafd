"""The gradient store: shards, manifest, integrity, memory-mapped reads (format version 2)."""

from gradpursuit.store.encoding import DTYPES, Block
from gradpursuit.store.folder import ShardFolder, ShardState
from gradpursuit.store.shards import Shard, ShardError
from gradpursuit.store.spec import StoreSpec
from gradpursuit.store.store import GradientStore, Problem

__all__ = [
    "DTYPES",
    "Block",
    "GradientStore",
    "Problem",
    "Shard",
    "ShardError",
    "ShardFolder",
    "ShardState",
    "StoreSpec",
]
