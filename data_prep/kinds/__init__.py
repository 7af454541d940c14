"""What is read: one record a kind of input file, with its endings and its reader (see registry.py)."""
