"""Hyperparameters that transfer across model scale, derived from the user's own model."""

from scaling.derive import derive
from scaling.records import ScalingTable

__all__ = ["ScalingTable", "derive"]
