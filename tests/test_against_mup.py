"""Microsoft's mup package (1.0.0) as an oracle: the same model, base width 64, target width 256.

mup is TP5 table 8, ours table 3: equal are the gauge invariants m·σ, m·η (Adam) and m²·η (SGD), m the forward multiplier.
"""

import warnings

import pytest
import torch
from models import GPT, MLP, ResNet

from scaling import derive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mup

BASE, TARGET = 64, 256
MODELS = {"MLP": (MLP, "head"), "ResNet": (ResNet, "fc"), "GPT": (GPT, "lm_head")}


def with_readout(name, width):
    build, head = MODELS[name]
    model = build(width)
    linear = getattr(model, head)
    setattr(model, head, mup.MuReadout(linear.in_features, linear.out_features, bias=linear.bias is not None))
    return model


def mup_model(name, width):
    torch.manual_seed(0)
    model = with_readout(name, width)
    return mup.set_base_shapes(model, with_readout(name, BASE), delta=with_readout(name, 128))


def learning_rates(model, optimizer_class):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = optimizer_class(model.parameters(), lr=1.0)
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def forward_multiplier(name, weight):
    """MuReadout divides its input by the width multiplier; its bias is added after."""
    return BASE / TARGET if weight == f"{MODELS[name][1]}.weight" else 1.0


@pytest.mark.parametrize("name", MODELS)
def test_learning_rates_are_mups_up_to_the_abc_shift(name):
    table = derive(MODELS[name][0](BASE))
    target = mup_model(name, TARGET)
    for family, optimizer, power in (("adam", mup.MuAdam, 1), ("sgd", mup.MuSGD, 2)):
        theirs = learning_rates(target, optimizer)
        assert theirs.keys() == {rule.name for rule in table}
        for rule in table:
            for block in rule.blocks:
                ours = block.lr[family].subs(table.width, TARGET) / block.lr[family].subs(table.width, BASE)
                assert float(ours) == theirs[rule.name] * forward_multiplier(name, rule.name) ** power, (family, rule.name)


@pytest.mark.parametrize("name", MODELS)
def test_initial_sizes_are_mups_up_to_the_abc_shift(name):
    """Measured: mup rescales draws. Gains start at 1; mup keeps the std of biases, as we keep what starts constant."""
    table = derive(MODELS[name][0](BASE))
    base, target = (dict(mup_model(name, width).named_parameters()) for width in (BASE, TARGET))
    for rule in table:
        if len(rule.dims) < 2:
            continue
        theirs = float((target[rule.name].std() / base[rule.name].std()).detach()) * forward_multiplier(name, rule.name)
        for block in rule.blocks:
            ours = float(block.init_std.subs(table.width, TARGET) / block.init_std.subs(table.width, BASE))
            assert theirs == pytest.approx(ours, rel=5 / min(base[rule.name].numel(), 4000) ** 0.5), rule.name
