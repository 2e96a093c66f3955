"""Text to tokens on disk, tokens on disk to packed sequences, sequences to micro-batches."""
