"""Everything that knows how DeepSpeed and torch.distributed look inside (see internals.py)."""
