"""Process groups, layouts, resharding, and the CPU shim for megatron-core."""
