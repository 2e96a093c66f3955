"""Pretraining of discrete diffusion language models on megatron-core."""
