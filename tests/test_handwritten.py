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


@pytest.mark.parametrize("name", ["diffusion_transformer", "message_passing", "sizes_in_python"])
def test_a_call_is_found_for_models_whose_inputs_must_fit_each_other(name):
    """By the shape that is unpacked, the batch that is shared, the edges that their features lie beside."""
    model = HANDWRITTEN[name]
    found, given = derive(model.build(32)), derive(model.build(32), model.inputs(32))
    assert found.coverage.unreached == ()
    assert [rule.name for rule in found] == [rule.name for rule in given]


def test_an_axis_that_is_normalised_is_not_taken_for_a_number_of_repeats():
    """F.normalize expands its norm to the shape of what it divides: the length is that of the width, not of copies."""
    model = HANDWRITTEN["temperature_for_the_loss"]
    assert derive(model.build(32), model.inputs(32))["join.weight"].role == "hidden"
