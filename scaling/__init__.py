"""Hyperparameters that transfer across model scale, derived from the user's own model."""
