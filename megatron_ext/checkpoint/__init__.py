"""Checkpoints: sharded training checkpoints and the published Hugging Face names."""
