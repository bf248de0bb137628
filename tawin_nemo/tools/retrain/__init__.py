"""Production retraining: one date's data, a warm start, a gate against the published model, publication."""
