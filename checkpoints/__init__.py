"""Programs that turn checkpoints into other layouts and other formats."""
