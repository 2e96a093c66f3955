"""The model on megatron-core: specs, attention, norms, initial weights."""
