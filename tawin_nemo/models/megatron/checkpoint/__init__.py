"""Distributed checkpoints: files, checksums, synchronous and asynchronous saving."""
