"""The model, its adapter, the warm-up run and the checkpoints it leaves."""
