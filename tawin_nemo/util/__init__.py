"""Errors, log, files that appear whole or not at all, and torch's calling modes: what every layer may use."""
