"""Data, from lines of files to packed batches."""
