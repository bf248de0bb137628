"""The algorithms as pure functions of tensors, one a file."""
