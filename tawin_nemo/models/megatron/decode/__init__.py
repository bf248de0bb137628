"""The model as a searchable language model: prompts once, then chains of tokens over stored keys."""
