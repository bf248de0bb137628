"""The optimizer step: micro-batches, fused kernels, offloading."""
