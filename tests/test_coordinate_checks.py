"""The record of ten coordinate checks says what the script of today would run, and what was found."""

import json
import re

import pytest

pytest.importorskip("transformers")

from survey import coordinate_checks as record

RUNS = json.loads(record.OUT.read_text())
POWER = json.loads(record.WRONG_OUT.read_text())
KEYS = [f"{name} {optimizer}" for name in record.MODELS for optimizer in ("adam", "muon")]
CASES = [(name, case) for name in record.WRONG for case in record.cases(name)]


def runs(seeds):
    return {key: RUNS[f"{key}, {seeds} seeds"] for key in KEYS if f"{key}, {seeds} seeds" in RUNS}


def test_all_twenty_were_run_under_the_setting_of_the_script():
    assert list(runs(3)) == KEYS
    assert set(runs(9)) == {key for key, run in runs(3).items() if run["outcome"] == "undecided"}, "nine seeds where three do not decide"
    assert len(RUNS) == 1 + len(runs(3)) + len(runs(9))
    for count, seeds in ((3, record.SEEDS), (9, record.MORE_SEEDS)):
        for run in runs(count).values():
            assert (run["widths"], run["seeds"]) == (list(record.WIDTHS), list(seeds))
    assert RUNS["notes"] == list(record.NOTES)


def test_all_twenty_pass_and_eighteen_by_plain_slopes():
    assert [key for key, run in runs(3).items() if not run["passed"]] == []
    assert [key for key, run in runs(9).items() if not run["passed"]] == []
    assert [key for key, run in runs(3).items() if run["plain_slopes_over"]] == ["mixtral adam", "mixtral muon"]
    assert not any(run["failed"] or run["missed"] for count in (3, 9) for run in runs(count).values())


def test_every_case_of_the_power_record_was_run():
    assert [(name, case) for name in record.WRONG for case in POWER[name]] == CASES
    for name, case in CASES:
        assert POWER[name][case]["seeds"] == list(record.cases(name)[case][1])
        assert POWER[name][case]["widths"] == list(record.WIDTHS)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_right_rules_pass_with_other_seeds_and_wrong_ones_fail_by_the_weight_that_is_wrong(name, case):
    found, (wrong, _) = POWER[name][case], record.cases(name)[case]
    assert found["passed"] == (wrong is None)
    if wrong is not None:
        assert found["outcome"] == "failed"
        assert re.search(wrong.weights, found["first"][0])
