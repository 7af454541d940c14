"""From raw text to indexed shards: readers, tokenizers, the restartable pipeline, and tools for its output."""
