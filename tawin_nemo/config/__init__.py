"""Recipes: every key with its meaning and limits, loading, and the checks that need no data."""
