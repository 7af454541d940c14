"""Reading tokenized data: the indexed format, the order of samples, packing, blends, the loader."""
