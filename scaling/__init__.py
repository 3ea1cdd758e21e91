"""Hyperparameters that transfer across model scale, derived from the user's own model."""

from scaling.derive import derive
from scaling.errors import ScalingError
from scaling.flow import flow
from scaling.lint import lint
from scaling.measure import assumptions, coordinate_check, learning_rate_sweep
from scaling.operators import register
from scaling.parametrizations import parametrization
from scaling.records import ScalingTable
from scaling.verify import verify

__all__ = [
    "ScalingError",
    "ScalingTable",
    "assumptions",
    "coordinate_check",
    "derive",
    "flow",
    "learning_rate_sweep",
    "lint",
    "parametrization",
    "register",
    "verify",
]
