"""Models as people write them by hand, each a function of the width: what the survey and `test_handwritten.py` derive.

Every entry of `HANDWRITTEN` says which role each weight plays, written down from reading the model, not from what `derive` prints.
"""

from .attention import ATTENTION
from .control import CONTROL
from .model import Handwritten
from .sequences import SEQUENCES
from .structures import STRUCTURES
from .vision import VISION

HANDWRITTEN: dict[str, Handwritten] = CONTROL | ATTENTION | SEQUENCES | VISION | STRUCTURES

__all__ = ["HANDWRITTEN", "Handwritten"]
