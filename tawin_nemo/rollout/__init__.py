"""Constrained search and sampling over any language model: model-agnostic."""
