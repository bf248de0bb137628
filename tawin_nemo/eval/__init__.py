"""Evaluation over the full catalog, intervals, paired tests and the report."""
