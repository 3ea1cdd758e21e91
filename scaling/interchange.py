"""A scaling table as JSON: every rule keyed by the weight's name, for other frameworks; and back, exactly.

Formulas are text in the syntax of Python: `sqrt`, `Min`, `Max`, `+ - * / **`, integers and `d`. To have numbers at width 1024:
`eval(weight["init_std"], {"sqrt": math.sqrt, "Min": min, "Max": max, "d": 1024})`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sympy
from pydantic import ValidationError

from scaling import optimizers
from scaling.errors import FormatError, MixedBlocks
from scaling.records import Block, Record, ScalingTable, WeightRule

__all__ = ["FORMAT", "from_json", "to_dict", "to_json"]

FORMAT = "spectral-mup scaling table 1"
"""What the key "format" says; the number goes up when a key changes its meaning."""

EXPRESSIONS = ("fan_in", "fan_out", "copies", "init_std", "multiplier", "eps", "weight_decay")
"""What a rule and its blocks say of themselves, as formulas in d."""


def to_dict(table: ScalingTable) -> dict[str, Any]:
    """The table in plain values: str, int, bool, None, list, dict.

    Under "weights", by name and in model order: `names` (all tied ones), `shape`, `dims`, `role`, `fan_in`, `fan_out`, `copies`,
    `init_std`, `multiplier`, `eps`, `weight_decay`, `lr` per optimizer, `exponents` (the power of d that each follows),
    `blocks`, `uses`, `notes`.
    Where the blocks of a weight differ in a value, the weight has None there and the blocks have it.
    """
    head = {"format": FORMAT, "model": table.model, "width": str(table.width), "size": table.size}
    weights = {rule.name: _weight(rule) for rule in table}
    return {**head, "weights": weights, **table.model_dump(mode="json", exclude={"rules", "model", "size"})}


def _weight(rule: WeightRule) -> dict[str, Any]:
    stored = rule.model_dump(mode="json")
    blocks = [stored_block | _values(block) for stored_block, block in zip(stored["blocks"], rule.blocks, strict=True)]
    return stored | _values(rule) | {"blocks": blocks}


def _values(rule: WeightRule | Block) -> dict[str, Any]:
    """What follows from a rule's entries."""
    exponents = {name: _unless_mixed(lambda name=name: rule.exponent(name)) for name in (*EXPRESSIONS, *optimizers.LEARNING_RATES)}
    return {
        "role": _unless_mixed(lambda: rule.role),
        **{name: _unless_mixed(lambda name=name: getattr(rule, name)) for name in EXPRESSIONS},
        "lr": {family: _unless_mixed(lambda family=family: _rate(rule, family)) for family in optimizers.LEARNING_RATES},
        "exponents": exponents,
        "dims": [str(dim) for dim in rule.dims],
    }


def _rate(rule: WeightRule | Block, family: str) -> sympy.Expr:
    rates = [block.lr[family] for block in (rule.blocks if isinstance(rule, WeightRule) else (rule,))]
    if any(rate != rates[0] for rate in rates):
        raise MixedBlocks("", family, map(str, rates))
    return rates[0]


def _unless_mixed(value: Callable[[], object]) -> str | None:
    try:
        return str(value())
    except MixedBlocks:
        return None


def to_json(table: ScalingTable, indent: int | None = 2) -> str:
    """`to_dict` as JSON text; `from_json` gives back an equal table."""
    return json.dumps(to_dict(table), indent=indent, ensure_ascii=False)


def from_json(text: str | bytes) -> ScalingTable:
    """The table that `to_json` wrote: equal to it, entry by entry.

    Whatever follows from other entries (init_std, lr, role, …) is derived again and must agree with the text, so that an edited or
    damaged value is not passed over.

    Raises:
        FormatError: if the text is no JSON, no scaling table, one of another version, or disagrees with itself.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise FormatError("its beginning" if not text else f"{text[:40]!r}…", f"it is no JSON ({error})") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        what = f'it has "format": {found!r}; this version reads {FORMAT!r}' if found else f'it has no "format": {FORMAT!r}'
        raise FormatError("the outermost {…}", what)
    try:
        rules = [
            _stored(weight, WeightRule) | {"blocks": [_stored(block, Block) for block in weight["blocks"]]}
            for weight in data["weights"].values()
        ]
        table = ScalingTable.model_validate(_stored(data, ScalingTable) | {"rules": rules})
        derived = to_dict(table)
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(".".join(map(str, first["loc"])), first["msg"]) from error
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError) as error:
        raise FormatError('one of its "weights"', f"{type(error).__name__}: {error}") from error
    _check_agreement(data, derived, "")
    return table


def _stored(data: dict[str, Any], record: type[Record]) -> dict[str, Any]:
    return {name: data[name] for name in record.model_fields if name in data}


def _check_agreement(given: Any, derived: Any, where: str) -> None:
    """Raises at the first value that was given and is not the derived one; what was not given is not missed."""
    if isinstance(given, dict) and isinstance(derived, dict):
        for key in given:
            _check_agreement(given[key], derived.get(key, "nothing"), f"{where}[{key!r}]")
    elif isinstance(given, list) and isinstance(derived, list) and len(given) == len(derived):
        for index, pair in enumerate(zip(given, derived, strict=True)):
            _check_agreement(*pair, f"{where}[{index}]")
    elif given != derived:
        raise FormatError(where, f"it has {given!r} where the rest of it makes {derived!r}")
