"""The model for Hugging Face: standalone files that are exported next to the weights."""

from megatron_ext.hf.configuration_gidd import GiddConfig
from megatron_ext.hf.modeling_gidd import GiddForDiffusionLM, GiddModel

__all__ = ["GiddConfig", "GiddForDiffusionLM", "GiddModel"]
