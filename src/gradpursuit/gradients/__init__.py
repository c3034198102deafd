"""Per-example gradients by hooks, preconditioners, the sketch, and the collector that fills a store."""
