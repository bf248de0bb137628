"""Interactions, prompts, tokens, and token trees: what a model reads."""
