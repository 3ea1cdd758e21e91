"""What a printed scaling table says, before any format sets it: columns, one line per weight, and what stands under them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import sympy

from scaling import optimizers
from scaling.folding import fold, template
from scaling.limits import DEPTH, WIDTH, exponent
from scaling.notation import Code, Text, decided, join
from scaling.records import AxisClass, Block, Branch, Contraction, Coverage, Residual, ScalingTable, Use, WeightRule

__all__ = ["COLUMNS", "Line", "Section", "Sheet", "operator_name", "phrase", "places", "same_rule", "sheet", "slice_text"]

ONE = sympy.Integer(1)
PLACES = 3  # of an axis class that are named before "and 9 more"


class Line(NamedTuple):
    """One line: `names` of the weights it stands for (folded), or the part of the weight above it where `part` is true."""

    names: tuple[Text, ...]
    cells: tuple[Text, ...]
    weights: int = 1
    part: bool = False


class Section(NamedTuple):
    """A paragraph under the table."""

    title: str
    lines: tuple[Text, ...]


class Sheet(NamedTuple):
    """A table ready to be set; `columns` are the headings after "weight"."""

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    sections: tuple[Section, ...]


def sheet(table: ScalingTable, *, full: bool = False) -> Sheet:
    """The table's lines and footer. Weights of repeated blocks that share all they show share a line, unless `full`."""
    groups: dict[object, list[tuple[WeightRule, list[Line]]]] = defaultdict(list)
    for rule in table:
        lines = _lines(rule)
        groups[rule.name if full else (tuple(map(template, rule.names)), *(line.cells for line in lines))].append((rule, lines))
    columns, lines = _drop_idle_columns([line for members in groups.values() for line in _together(members)])
    return Sheet(columns, lines, tuple(section for section in _sections(table, full=full) if section.lines))


# --- columns ------------------------------------------------------------------------------------------------------------------------


def _times(dims: tuple[sympy.Expr, ...]) -> Text:
    return join(" × ", [(dim,) for dim in dims]) or ("1",)


def _muon(block: Block) -> Text:
    return (block.lr["muon"],) if block.role == "hidden" else ("(adam)",)


COLUMNS: dict[str, Callable[[Block], Text]] = {
    "fan_in": lambda block: (block.fan_in,),
    "fan_out": lambda block: (block.fan_out,),
    "multiplier": lambda block: (block.multiplier,),
    "init_std": lambda block: (decided(block.init_std),),
    "lr muon": _muon,
    "role": lambda block: (block.role,),
}
"""Heading -> what it says of a map. Every other optimizer family's lr stands before lr muon; before all the shape, after all the why."""

IDLE = {"multiplier"}
"""Columns that are left out where they are 1 everywhere."""


def _columns() -> dict[str, Callable[[Block], Text]]:
    rates: dict[str, Callable[[Block], Text]] = {
        f"lr {family}": lambda block, family=family: (block.lr[family],) for family in optimizers.LEARNING_RATES
    }
    at = list(COLUMNS).index("lr muon")
    items = list(COLUMNS.items())
    return {**dict(items[:at]), **rates, **dict(items[at:])}


def _drop_idle_columns(lines: list[Line]) -> tuple[tuple[str, ...], tuple[Line, ...]]:
    headings = ("shape", *_columns(), "why")
    kept = [i for i, head in enumerate(headings) if head not in IDLE or any(line.cells[i] not in ((), (ONE,)) for line in lines)]
    return tuple(headings[i] for i in kept), tuple(line._replace(cells=tuple(line.cells[i] for i in kept)) for line in lines)


# --- lines --------------------------------------------------------------------------------------------------------------------------


def _lines(rule: WeightRule) -> list[Line]:
    """One line where all blocks have one rule; else a line for the weight and one for each block."""
    first = rule.blocks[0]
    if all(same_rule(first, block) for block in rule.blocks):
        cells = {name: column(first) for name, column in _columns().items()} | {"multiplier": (rule.multiplier,)}
        return [Line((), (_times(rule.dims), *cells.values(), _why(rule)))]
    blanks: list[Text] = [()] * len(_columns())
    head = Line((), (_times(rule.dims), *blanks, (f"{_operators(rule)}: {len(rule.blocks)} blocks with rules of their own",)))
    return [head, *(_block_line(block) for block in rule.blocks)]


def _block_line(block: Block) -> Line:
    return Line(
        (slice_text(block),), (_times(block.dims), *(column(block) for column in _columns().values()), phrase(block, block)), part=True
    )


def same_rule(one: Block, other: Block) -> bool:
    """Whether two blocks differ in nothing but where in the weight they are."""
    return one.model_copy(update={"axes": other.axes}) == other


def _together(members: list[tuple[WeightRule, list[Line]]]) -> list[Line]:
    """The lines of weights that show the same, under their folded names and those they are tied to."""
    names = [Code(name) for name in fold(rule.name for rule, _ in members)]
    ties = [("= ", Code(name)) for name in fold(name for rule, _ in members for name in rule.names[1:])]
    head, *parts = members[0][1]
    return [head._replace(names=(join(", ", [(name,) for name in names]), *ties), weights=len(members)), *parts]


def slice_text(block: Block) -> Text:
    """Which part of the weight a block is, as Python would slice it: [d:2d, :]; [(:, 0:1, :), :] where axis 0 is a product of three."""
    axes = []
    for axis, whole in zip(block.axes, block.slices or [None] * len(block.axes), strict=True):
        bounds = [(":",) if factor.whole else (factor.start, ":", factor.stop) for factor in axis]
        if all(factor.whole for factor in axis):
            axes.append((":",))
        elif whole is not None:
            axes.append((whole.start, ":", whole.stop))
        else:
            axes.append(("(", *join(", ", bounds), ")"))
    return ("[", *join(", ", axes), "]")


# --- why ----------------------------------------------------------------------------------------------------------------------------


def operator_name(operator: str) -> str:
    """The operator without the namespace and overload that ATen has for everything: `aten.linear.default` is `linear`."""
    return operator.removeprefix("aten.").removeprefix("aten::").split(".")[0]


def _operators(rule: WeightRule) -> str:
    return ", ".join(dict.fromkeys(operator_name(use.operator) for use in rule.uses))


def _why(rule: WeightRule) -> Text:
    """The operators, and how each uses the weight's axes."""
    block = rule.blocks[0]
    if len(rule.blocks) > 1:
        return (f"{_operators(rule)}: ", *phrase(block, block), f" ({len(rule.blocks)} blocks)")
    uses = Counter((f"{operator_name(use.operator)}: ", *phrase(use, block)) for use in rule.uses)
    return join("; ", [(*text, f" ({count} uses)") if count > 1 else text for text, count in uses.items()])


def phrase(use: Use | Block, block: Block) -> Text:
    """How a map uses the axes, in a few words, and what is unusual about it; `block` has the axes of the weight."""
    named = {"copies": use.copies, "times": use.multiplier, "of input RMS": use.input_scale, "of output RMS": use.target * use.branch}
    unusual = [(", ", value, " copies") if name == "copies" else (f", {name} ", value) for name, value in named.items() if value != 1]
    divided = () if use.entries is None else (", norm divided out, entries ", use.entries)
    return (*_map(use, block), *join("", unusual), *divided)


def _map(use: Use | Block, block: Block) -> Text:
    if use.lookup:
        return ("lookup of ", _looked_up(block), " rows")
    if use.fan_in != 1 or any(factor.part == "in" for axis in block.axes for factor in axis):
        return ("sums ", use.fan_in, ", emits ", use.fan_out)
    if use.fan_out != 1:
        return ("one per output",)
    return ("gain" if use.copies != 1 else "one number",)


def _looked_up(block: Block) -> sympy.Expr:
    return sympy.Mul(*(factor.extent for axis in block.axes for factor in axis if factor.part == "lookup"))


# --- under the table ----------------------------------------------------------------------------------------------------------------


def _sections(table: ScalingTable, *, full: bool) -> Iterable[Section]:
    model = f" in this model ({table.model})" if table.model else " in this model"
    yield Section("Width", ((WIDTH, f" = {table.size}{model}"),))
    yield Section("Depth", tuple(_depth(table.residual, full=full) if table.residual is not None else ()))
    yield Section("Reading", (*((line,) for line in READING), *_matrix_note(table)))
    yield Section("Axes", (*_axes(table.classes, full=full), *_flip(table.classes)))
    yield Section("Products of two activations summed over a growing axis", tuple(_contractions(table.contractions, full=full)))
    yield Section("Notes", tuple(_notes(table, full=full)))
    yield Section("Coverage", tuple(_coverage(table.coverage)))


READING = (
    "init_std: standard deviation of the random initial entries; what starts at a constant (biases, gains) keeps it",
    "lr: factor on the nominal learning rate of an optimizer",
)


def _depth(residual: Residual, *, full: bool) -> Iterable[Text]:
    """What L counts, where each L^-α is, and what is no branch of its own."""
    yield (DEPTH, f" = {residual.size} residual branches, added one after the other to the stream of values in this model")
    groups: dict[object, list[Branch]] = defaultdict(list)
    for one in residual.branches:
        source = one.source.model_copy(update={"module": ""})
        alike = (source, one.scale, one.present, one.forward, template(one.at), tuple(map(template, one.folded)))
        groups[one if full else alike].append(one)
    for group in groups.values():
        yield _branch(group)
    if residual.shared:
        yield ("shared over depth, so that gradients add up: ", *join(", ", [(Code(name),) for name in fold(residual.shared)]))
    if residual.on_stream:
        names = join(", ", [(Code(name),) for name in fold(residual.on_stream)])
        yield ("on the stream after every addition, so that updates add up: ", *names)


def _branch(group: list[Branch]) -> Text:
    """Branches that are alike: their multiplier, and what carries it."""
    first, many = group[0], f" ×{len(group)}" if len(group) > 1 else ""
    head: Text = (
        Code(f"{first.source.file}:{first.source.line}: {first.source.code}"),
        f"{many}: the branch is multiplied by ",
        first.scale,
    )
    has: Text = (", of which the forward has ", first.present) if first.present != 1 else ()
    folded = fold(dict.fromkeys(name for one in group for name in one.folded))
    if folded:
        return (*head, *has, ", in the init and learning rate of ", *join(", ", [(Code(name),) for name in folded]))
    if first.forward == 1:
        return (*head, ", which the forward has" if first.present != 1 else "")
    at = fold(dict.fromkeys(one.at for one in group if one.at))
    where: Text = ("on the output of ", *join(", ", [(Code(name),) for name in at])) if at else ("by hand, before the addition",)
    return (*head, *has, "; no weight at its end can carry it alone: multiply by ", first.forward, " in the forward, ", *where)


def _matrix_note(table: ScalingTable) -> list[Text]:
    if all(block.role == "hidden" for rule in table for block in rule.blocks):
        return []
    return [
        ("(adam): fan_in and fan_out do not both grow, so a matrix optimizer leaves this weight to AdamW, with the factor under lr adam",)
    ]


def _axes(classes: Iterable[AxisClass], *, full: bool) -> Iterable[Text]:
    groups: dict[object, list[AxisClass]] = defaultdict(list)
    for one in classes:
        alike = (one.dims, one.size, one.grows, one.known, template(one.reason), *((template(name), axis) for name, axis in one.where))
        groups[(one.where, one.size) if full else alike].append(one)
    for group in groups.values():
        first, many = group[0], f" ×{len(group)}" if len(group) > 1 else ""
        size: Text = (first.dims, f" = {first.size}") if first.dims.has(WIDTH) else (first.dims,)
        state = f"{'grows' if first.grows else 'fixed'}, {'known' if first.known else 'guessed'}"
        reasons = "; ".join(fold(dict.fromkeys(one.reason for one in group if one.reason)))
        yield (
            *size,
            f"{many}: {state}",
            f" ({reasons})" if reasons else "",
            "; ",
            *places((place for one in group for place in one.where), full=full),
        )


def places(where: Iterable[tuple[str, int]], *, full: bool = False) -> Text:
    """Weight axes, folded, as name[axis]; a few of them, unless `full`."""
    axes: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, axis in where:
        axes[template(name), axis].append(name)
    texts: list[Text] = [(Code(f"{name}[{axis}]"),) for (_, axis), names in axes.items() for name in fold(names)]
    shown = texts if full or len(texts) <= PLACES + 1 else [*texts[:PLACES], (f"and {len(texts) - PLACES} more",)]
    return join(", ", shown)


def _flip(classes: Iterable[AxisClass]) -> list[Text]:
    """What to type where a guess is wrong: the call that flips the first guessed class of each kind."""
    guessed = {one.grows: one.where[0] for one in reversed(list(classes)) if not one.known and one.where}
    calls = [("fixed" if grows else "grows", *guessed[grows]) for grows in (True, False) if grows in guessed]
    texts: list[Text] = [(Code(f'derive(model, {option}={{"{name}": {axis}}})'),) for option, name, axis in calls]
    return [("name[axis] is guessed wrong? flip it: ", *join(" or ", texts))] if texts else []


def _contractions(contractions: Iterable[Contraction], *, full: bool) -> Iterable[Text]:
    groups: dict[object, list[Contraction]] = defaultdict(list)
    for one in contractions:
        line = one.source.model_copy(update={"module": template(one.source.module)})
        alike = (one.operator, line, one.dim, one.present, tuple(map(template, one.folded)))
        groups[one if full else alike].append(one)
    for group in groups.values():
        first, many = group[0], f" ×{len(group)}" if len(group) > 1 else ""
        needs: Text = (
            f"{operator_name(first.operator)}{many} sums over ",
            first.dim,
            ": needs the factor ",
            1 / first.dim,
            ", has ",
            first.present,
        )
        at: Text = (" (at ", Code(f"{first.source.file}:{first.source.line}: {first.source.code}"), ")")
        yield (*needs, *_remedy(first, [name for one in group for name in one.folded]), *at)


def _remedy(contraction: Contraction, folded: list[str]) -> Text:
    missing = 1 / (contraction.dim * contraction.present)
    if exponent(missing) == 0:
        return (", which follows it",)
    if not folded:
        return (
            "; nothing upstream could take the missing ",
            missing,
            ": multiply by it in the forward",
        )
    return ("; the missing ", missing, " is in the rule of ", *join(", ", [(Code(name),) for name in fold(folded)]))


def _notes(table: ScalingTable, *, full: bool) -> Iterable[Text]:
    yield from ((note,) for note in table.notes)
    noted: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, note in ((rule.name, note) for rule in table for note in rule.notes):
        noted[f"{name}: {note}" if full else template(note)].append((name, note))
    for pairs in noted.values():
        names: list[Text] = [(Code(name),) for name in fold(name for name, _ in pairs)]
        yield (*join(", ", names), ": ", "; ".join(fold(note for _, note in pairs)))


def _coverage(coverage: Coverage) -> Iterable[Text]:
    yield (f"{coverage.reached} of {coverage.trainable} trainable weights have a rule",)
    if coverage.unreached:
        yield ("without one: ", *join(", ", [(Code(name),) for name in fold(coverage.unreached)]))
    if coverage.operators_without_rule:
        yield ("operators without a signature: ", *join(", ", [(Code(name),) for name in coverage.operators_without_rule]))
    if coverage.made_up:
        yield (f"{coverage.made_up} integers that depend on activations (a router's choice) were made up while recording",)
