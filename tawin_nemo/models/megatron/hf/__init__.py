"""Hugging Face checkpoints: read, written, and held in memory."""
