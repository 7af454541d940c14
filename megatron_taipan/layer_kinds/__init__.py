"""What each letter of a pattern stands for: one record a kind, which everything else asks (see registry.py)."""
