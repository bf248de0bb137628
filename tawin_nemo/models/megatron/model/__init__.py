"""A decoder on megatron-core: layers, head, precision, and the forward pass over packed token trees."""
