"""Reinforcement learning for LLM recommenders at Megatron scale: trie-constrained rollouts and TAWin."""

__version__ = "0.1.0"
