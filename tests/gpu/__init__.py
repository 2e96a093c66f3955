"""What only a machine with GPUs can show; docs/gpu-checklist.md lists it."""
