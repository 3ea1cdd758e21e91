"""Models written by hand, in every style: each is derived from three widths and from one, unmodified."""

import fnmatch

import pytest
from handwritten import HANDWRITTEN

from scaling import derive

WIDTHS = (16, 24, 32)


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_a_hand_written_model_gets_the_roles_that_reading_it_gives(name):
    model = HANDWRITTEN[name]
    table = derive(model.build, model.inputs, model.kwargs(16), widths=WIDTHS)
    got = {rule.name: ", ".join(sorted({block.role for block in rule.blocks})) for rule in table}
    assert got == {weight: model.role(weight) for weight in got}
    lost = [weight for weight in table.coverage.unreached if not any(fnmatch.fnmatchcase(weight, pattern) for pattern in model.unreached)]
    assert not lost
