"""Models on megatron-core."""
