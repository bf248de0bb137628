"""Beside training: plan, doctor, study, retrain, simulate."""
