"""Optimizers, CompleteP parameter groups and the learning-rate schedule."""

from megatron_ext.optim.laprop import AdamW, LaProp

__all__ = ["AdamW", "LaProp"]
