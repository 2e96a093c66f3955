"""FLOPs, memory, time and scaling laws; numbers only, no megatron."""
