"""What each letter of a pattern means: one record a kind, which everything else asks (see registry.py)."""
