"""Tokenizers of every form that is read, for data, exports and inference alike: one class a library (see load.py)."""
