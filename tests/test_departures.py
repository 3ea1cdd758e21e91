"""Where a failure shows first: the value, when, how large, by which path, and the cure; against the sizes that flow has."""

import json
import re
import shutil
import subprocess

import models
import pytest
import sympy
import torch
import torch.nn.functional as F
from matplotlib.mathtext import MathTextParser
from torch import nn

from scaling import derive
from scaling.limits import WIDTH
from scaling.parametrizations import parametrization
from scaling.records import ScalingTable
from scaling.verdict import Verdict
from scaling.verify import verify

d, R, ONE = WIDTH, sympy.Rational, sympy.Integer(1)


@pytest.fixture(scope="module")
def gpt():
    return derive(models.GPT, models.ids(), widths=(64, 128))


@pytest.fixture(scope="module")
def fixed():
    return derive(lambda width: models.GPT(width, heads=4), models.ids(), widths=(64, 128))


def with_law(table, name, base, family="adam", **changes):
    one = parametrization(table, base, family)
    return one.model_copy(update={"laws": {**one.laws, name: tuple(law.model_copy(update=changes) for law in one.laws[name])}})


def line_of(text):
    """The line of tests/models.py that has a text."""
    with open(models.__file__, encoding="utf-8") as file:  # noqa: PTH123
        return next(i for i, line in enumerate(file, 1) if text in line)


def test_a_readout_without_its_multiplier_is_the_first_value_to_blow_up_with_its_path_and_cure(gpt):
    verdict = verify(with_law(gpt, "lm_head.weight", "table8", multiplier=ONE), table=gpt)
    [one] = verdict.departures
    assert (one.grows, one.when, one.power, one.expected) == (True, "at init", R(1, 2), R(-1, 2))
    assert (one.value.module, one.value.operator) == ("lm_head", "aten.linear")
    here = line_of("self.lm_head(self.ln_f(x))")
    assert one.value.source.line == here
    steps = [(step.operator.removeprefix("aten."), step.module) for step in one.path]
    assert steps == [
        ("embedding", "wte"),
        ("add", ""),
        ("add", "h.[0-1]"),
        ("add", "h.[0-1]"),
        ("layer_norm", "ln_f"),
        ("linear", "lm_head"),
    ]
    assert one.cure == (
        f"lm_head.weight: readout multiplier 1/d missing: logits grow as d^(1/2) at init and grow as d after one step, models.py:{here}"
    )
    assert f"First to blow up, at init: linear in lm_head, models.py:{here}, of order √d, should be 1/√d" in str(verdict)
    assert "the path to it, with the size of each value (at init, of its change):" in str(verdict)


@pytest.mark.parametrize(
    ("weight", "family", "changes", "expected"),
    [
        ("lm_head.weight", "adam", {"init_std": 1 / sympy.sqrt(d)}, (True, "after one step", "lm_head", R(1, 2))),
        ("lm_head.weight", "adam", {"lr": ONE}, (True, "after one step", "lm_head", 1)),
        ("h.1.mlp.0.weight", "adam", {"lr": ONE}, (True, "after one step", "h.1.mlp.0", 1)),
        ("h.1.mlp.0.weight", "adam", {"init_std": ONE}, (True, "at init", "h.1.mlp.0", R(1, 2))),
        ("wte.weight", "adam", {"init_std": 1 / d}, (False, "at init", "wte", -1)),
        ("wte.weight", "sgd", {"init_std": 1 / d, "lr": ONE}, (False, "at init", "wte", -1)),
        ("wte.weight", "adam", {"lr": 1 / d}, (False, "after a few steps", "wte", -1)),
    ],
)
def test_the_first_departure_is_at_the_weight_whose_law_is_wrong(gpt, weight, family, changes, expected):
    if "lr" in changes:
        changes = {**changes, "weight_decay": 1 / changes["lr"]}
    verdict = verify(with_law(gpt, weight, "table3", family, **changes), table=gpt)
    one = verdict.departures[0]
    grows, when, module, power = expected
    assert (one.grows, one.when, one.value.module, one.power) == (grows, when, module, power)
    assert one.cure.startswith(f"{weight}: ")


def test_a_weight_that_moves_too_little_among_others_that_move_is_a_failed_obligation_and_no_departure(gpt):
    slow = {"lr": 1 / sympy.sqrt(d), "weight_decay": sympy.sqrt(d)}
    verdict = verify(with_law(gpt, "h.0.attn.c_proj.weight", "table3", "muon", **slow), table=gpt)
    assert [(one.weight, one.name) for one in verdict.failed] == [("h.0.attn.c_proj.weight", "update")]
    assert verdict.departures == ()  # its input moves, so what it makes of it does too


def test_standard_blows_up_in_the_first_hidden_matrix_under_adam_and_through_the_gradient_under_sgd(gpt):
    adam, sgd = (verify(parametrization(gpt, "standard", family), table=gpt).departures[0] for family in ("adam", "sgd"))
    assert (adam.value.module, adam.power, adam.when) == ("h.0.attn.c_attn", 1, "after one step")
    assert "adam lr is d too large" in adam.cure
    assert (sgd.value.module, sgd.power, sgd.when) == ("h.0.attn.c_attn", R(1, 2), "after one step")
    assert sgd.cure.startswith("lm_head.weight: readout multiplier 1/√d missing")  # √n too large, and so is the gradient it hands back


def test_ntk_vanishes_in_the_embedding_and_nothing_blows_up(gpt):
    [one] = verify(parametrization(gpt, "ntk"), table=gpt).departures
    assert (one.grows, one.value.module, one.power) == (False, "wte", R(-1, 2))
    assert "adam lr is d^(1/2) too small" in one.cure


def test_attention_by_one_over_root_d_names_the_logits_inside_the_operator(fixed):
    alone = tuple(one.model_copy(update={"folded": ()}) for one in fixed.contractions)
    rules = tuple(
        rule.model_copy(update={"blocks": tuple(block.model_copy(update={"target": ONE}) for block in rule.blocks)}) for rule in fixed
    )
    table = fixed.model_copy(update={"contractions": alone, "rules": rules})
    laws = {rule.name: parametrization(table, "table3").laws[rule.name] for rule in fixed}
    verdict = verify(parametrization(fixed, "table3").model_copy(update={"laws": laws}), table=fixed)
    grown = verdict.departures[0]
    assert (grown.grows, grown.when) == (True, "after one step")
    assert "c_attn" in grown.cure or "the factor 2/√d is missing" in grown.cure


def test_a_proof_has_no_departure_and_neither_has_a_wrong_epsilon(gpt):
    assert verify(gpt).departures == ()
    verdict = verify(with_law(gpt, "wte.weight", "table3", eps=ONE), table=gpt)
    assert not verdict
    assert verdict.departures == ()  # ε is no part of what flow carries: it is an obligation with a cure


def test_a_table_read_from_json_has_no_graph_to_say_where(gpt):
    table = ScalingTable.from_json(gpt.to_json())
    verdict = verify(parametrization(table, "standard"), table=table)
    assert not verdict
    assert (bool(verdict.cures), verdict.departures) == (True, ())


def test_against_another_parametrization_the_sizes_are_compared_with_its_own(gpt):
    standard = parametrization(gpt, "standard")
    assert verify(standard, against="standard", table=gpt).departures == ()
    one = verify(parametrization(gpt, "table3"), against="ntk", table=gpt).departures
    assert all(not departure.grows for departure in one)  # what moves more than NTK moves it stays of order 1


def test_depth_and_width_together_say_where_too():
    table = derive(lambda width: models.GPT(width), models.ids(), widths=(64, 128), depth=True)
    verdict = verify(parametrization(table, "standard"), table=table)
    assert verdict.departures[0].value.module == "h.0.attn.c_attn"


FAILED = {
    "standard": lambda table: verify(parametrization(table, "standard"), table=table),
    "ntk": lambda table: verify(parametrization(table, "ntk", "sgd"), table=table),
    "against": lambda table: verify(parametrization(table, "standard", "sgd"), against="table9", table=table),
}


@pytest.mark.parametrize("name", FAILED)
def test_every_format_has_the_value_its_path_and_its_cure(gpt, name):
    verdict = FAILED[name](gpt)
    assert verdict.departures
    again = Verdict.from_json(verdict.to_json())
    assert (again, again.departures, str(again)) == (verdict, verdict.departures, str(verdict))
    for one, loaded in zip(verdict.departures, json.loads(verdict.to_json())["departures"], strict=True):
        assert loaded["power"] == str(one.power)
        for text in (verdict.to_text(), verdict.to_markdown()):
            assert one.headline[1:] in text
            assert one.cure in text
            assert all(step.source.code in text and step.where in text for step in one.path)
        assert f"models.py:{one.value.source.line}" in verdict.to_latex()


@pytest.mark.parametrize("name", [*FAILED, "proven"])
def test_the_latex_is_balanced_and_every_formula_of_it_is_set_by_matplotlib(gpt, name):
    text = (FAILED.get(name) or verify)(gpt).to_latex()
    assert text.isascii()
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    environments = []
    for kind, which in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        assert kind == "begin" or environments.pop() == which
        environments += [which] if kind == "begin" else []
    assert not environments
    formulas = re.findall(r"(?<!\\)\$(.*?)(?<!\\)\$", text)
    parser = MathTextParser("path")
    for formula in sorted(set(formulas) - {r"\surd"}):
        parser.parse(f"${formula.replace(chr(92) + ',', '')}$")
    assert len(formulas) > 20


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
@pytest.mark.parametrize("name", [*FAILED, "proven"])
def test_base_latex_without_a_package_sets_it(gpt, name, tmp_path):
    text = (FAILED.get(name) or verify)(gpt).to_latex()
    (tmp_path / "proof.tex").write_text(f"\\documentclass{{article}}\n\\begin{{document}}\n{text}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "proof.tex"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert ran.returncode == 0, ran.stdout[-2000:]


def test_the_path_follows_the_residual_stream_and_lines_of_repeated_blocks_come_once():
    class Tall(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.blocks = nn.Linear(5, width), nn.ModuleList(nn.Linear(width, width) for _ in range(6))
            self.head = nn.Linear(width, 3)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + F.relu(block(x))
            return self.head(x)

    table = derive(Tall, torch.zeros(2, 5), widths=(64, 128))
    [one] = verify(with_law(table, "head.weight", "table3", lr=ONE, weight_decay=ONE), table=table).departures
    assert [(step.operator, step.module) for step in one.path] == [
        ("aten.linear", "stem"),
        ("aten.add", ""),
        ("aten.linear", "head"),
    ]
