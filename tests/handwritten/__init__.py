"""Models as people write them by hand, each a function of the width: what the survey and `test_handwritten.py` derive.

Every entry of `HANDWRITTEN` says which role each weight plays, written down from reading the model, not from what `derive` prints.
"""

from tests.handwritten.attention import ATTENTION
from tests.handwritten.control import CONTROL
from tests.handwritten.model import Handwritten
from tests.handwritten.sequences import SEQUENCES
from tests.handwritten.structures import STRUCTURES
from tests.handwritten.vision import VISION

HANDWRITTEN: dict[str, Handwritten] = CONTROL | ATTENTION | SEQUENCES | VISION | STRUCTURES

__all__ = ["HANDWRITTEN", "Handwritten"]
