"""The attention core: bidirectional, soft-capped, with a key/value token and a visibility mask."""

from megatron_ext.kernels.attention.reference import attention_reference

__all__ = ["attention_reference"]
