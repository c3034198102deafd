"""The gradient store: shards, manifest, integrity, memory-mapped reads (format version 1)."""

from gradpursuit.store.shards import Shard
from gradpursuit.store.store import GradientStore, StoreSpec

__all__ = ["GradientStore", "Shard", "StoreSpec"]
