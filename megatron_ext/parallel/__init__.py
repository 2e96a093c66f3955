"""Process groups, collectives with gradients, and running megatron-core without CUDA."""
