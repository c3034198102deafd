"""Fine-tuning on the subsets and scoring held-out target examples."""
