"""The nouns: frozen values that the stages hand on, and that a user holds in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import sympy
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, PrivateAttr

from scaling import optimizers
from scaling.errors import MixedBlocks, NoGraph, UnknownName, WrongWidth
from scaling.limits import DEPTH, WIDTH, exact, exponent

if TYPE_CHECKING:
    from scaling.graph import LayerGraph
    from scaling.growth import Growth
    from scaling.uses import WeightUse

__all__ = [
    "AxisClass",
    "Block",
    "Branch",
    "Contraction",
    "Coverage",
    "Exact",
    "Factor",
    "Law",
    "Parametrization",
    "Record",
    "Residual",
    "ScalingTable",
    "Source",
    "Trace",
    "Use",
    "WeightRule",
]

Exact = Annotated[sympy.Expr, BeforeValidator(exact), PlainSerializer(str, return_type=str)]
Part = Literal["in", "out", "copy", "lookup"]
Role = Literal["input", "embedding", "hidden", "output", "vector", "scalar"]
ONE = sympy.Integer(1)

QUANTITIES = ("init_std", "multiplier", "fan_in", "fan_out", "copies", "eps", "weight_decay", *optimizers.LEARNING_RATES)


class Record(BaseModel):
    """A frozen value."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")


def _short(file: str) -> str:
    """A path as one would say it: below the current folder, or below site-packages."""
    below = file.rpartition("site-packages/")[2]
    return below if below != file else file.removeprefix(f"{Path.cwd()}/")


class Source(Record):
    """A line of the user's own file, and the module whose forward it belongs to."""

    file: str
    line: int
    code: str
    module: str

    def __str__(self) -> str:
        return f"{_short(self.file)}:{self.line}: {self.code}" + (f"  (in {self.module})" if self.module else "")


class Factor(Record):
    """One factor of a weight's axis (an axis is a product, outermost first) and the part of it a block takes.

    `part`: "in" is summed over, "out" survives, "copy" is shared with the input (one map per index), "lookup" is indexed.
    """

    size: Exact
    part: Part
    start: Exact
    stop: Exact

    @property
    def extent(self) -> sympy.Expr:
        """The number of indices the block takes."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether the block takes all of the factor."""
        return self.start == 0 and self.stop == self.size


class _Map(Record):
    fan_in: Exact
    fan_out: Exact
    copies: Exact = ONE
    multiplier: Exact = ONE
    input_scale: Exact = ONE
    target: Exact = ONE
    branch: Exact = ONE
    gradient: Exact = ONE
    share: Exact = ONE
    entries: Exact | None = None


class Use(_Map):
    """A weight at one operator: `fan_in` terms are summed into each of `fan_out` outputs, in `copies` separate maps.

    `target` is the RMS size the output is meant to have and `input_scale` the input's, 1 but for THEORY 1.7's exceptions.
    `multiplier` is the fixed factor on the weight at this use. `branch`, `gradient` and `share` are what depth asks of a weight in a
    residual branch (`scaling.optimizers`), 1 in a table without depth. `entries` is the size of the entries where the model divides the
    weight by its own norm, whatever they were before.
    """

    operator: str
    source: Source
    lookup: bool = False


class Block(_Map):
    """A part of a weight that is a map of its own (q in a fused q‖k‖v): the rules hold for it alone.

    `axes` has one tuple of factors per weight axis.
    """

    axes: tuple[tuple[Factor, ...], ...]
    lookup: bool = False

    @property
    def dims(self) -> tuple[sympy.Expr, ...]:
        """The block's own shape in d."""
        return tuple(sympy.Mul(*(factor.extent for factor in axis)) for axis in self.axes)

    @property
    def slices(self) -> tuple[slice, ...] | None:
        """One slice per weight axis, bounds in d; None where the block is interleaved with others (read `axes` then)."""
        out = []
        for axis in self.axes:
            first, rest = axis[0] if axis else None, axis[1:]
            if any(not factor.whole for factor in rest):
                return None
            inner = sympy.Mul(*(factor.size for factor in rest))
            out.append(slice(first.start * inner, first.stop * inner) if first else slice(sympy.Integer(0), ONE))
        return tuple(out)

    @property
    def gain(self) -> sympy.Expr:
        """The size of the output over that of the input: what multiplies a weight that keeps its own law (a constant, a decay rate)."""
        return self.target * self.branch / self.input_scale

    @property
    def init_std(self) -> sympy.Expr:
        """σ of the initial Gaussian entries."""
        return optimizers.init_std(self)

    @property
    def spectral_norm(self) -> sympy.Expr:
        """‖W‖₂ and ‖ΔW‖₂ as the spectral condition wants them."""
        return optimizers.spectral_norm(self)

    @property
    def lr(self) -> dict[str, sympy.Expr]:
        """Learning-rate factor per optimizer family."""
        return {family: rule(self) for family, rule in optimizers.LEARNING_RATES.items()}

    @property
    def eps(self) -> sympy.Expr:
        """Factor on Adam's ε."""
        return optimizers.epsilon(self)

    @property
    def weight_decay(self) -> sympy.Expr:
        """Factor on AdamW's (lr-coupled) λ; for another family it is one over that family's lr factor."""
        return optimizers.weight_decay(self)

    @property
    def role(self) -> Role:
        """What the limits d→∞ of the fans recover (TP5, App. B); never an input to a rule."""
        contracts, emits, copied = (exponent(value) > 0 for value in (self.fan_in, self.fan_out, self.copies))
        if contracts:
            return "hidden" if emits else "output"
        if not (emits or copied):
            return "scalar"
        if self.lookup:
            return "embedding"
        return "input" if emits and self.fan_in != 1 else "vector"

    def quantity(self, name: str) -> sympy.Expr:
        """A quantity by the name `exponent` takes.

        Raises:
            UnknownName: if there is no such quantity.
        """
        if name in optimizers.LEARNING_RATES:
            return self.lr[name]
        if name not in QUANTITIES:
            raise UnknownName("quantity", name, QUANTITIES)
        return getattr(self, name)

    def exponent(self, name: str, of: sympy.Symbol = WIDTH) -> sympy.Rational:
        """The power of d (or of `table.depth`) that the quantity follows as d→∞ (L→∞)."""
        return exponent(self.quantity(name), of)


class WeightRule(Record):
    """The rules of one trainable weight. Quantities are exact sympy expressions in the width d.

    A quantity in which the blocks differ is asked of a block: `rule.blocks[0].fan_out`.

    Raises:
        MixedBlocks: by every quantity in which the blocks differ.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[Exact, ...]
    uses: tuple[Use, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first of the weight's names; `names` has the tied ones too."""
        return self.names[0]

    def _agreed(self, quantity: str, values: list) -> sympy.Expr:
        first = values[0]
        if any(value != first for value in values[1:]):
            raise MixedBlocks(self.name, quantity, dict.fromkeys(map(str, values)))
        return first

    @property
    def fan_in(self) -> sympy.Expr:
        """Terms summed into one output coordinate."""
        return self._agreed("fan_in", [block.fan_in for block in self.blocks])

    @property
    def fan_out(self) -> sympy.Expr:
        """Output coordinates of one map."""
        return self._agreed("fan_out", [block.fan_out for block in self.blocks])

    @property
    def copies(self) -> sympy.Expr:
        """Separate maps."""
        return self._agreed("copies", [block.copies for block in self.blocks])

    @property
    def init_std(self) -> sympy.Expr:
        """σ of the initial Gaussian entries."""
        return self._agreed("init_std", [block.init_std for block in self.blocks])

    @property
    def multiplier(self) -> sympy.Expr:
        """The fixed factor on the weight in the forward pass; for a tied weight the one of its later use."""
        scaled = [use.multiplier for use in reversed(self.uses) if use.multiplier != 1]
        return scaled[0] if scaled else self._agreed("multiplier", [block.multiplier for block in self.blocks])

    @property
    def lr(self) -> dict[str, sympy.Expr]:
        """Learning-rate factor per optimizer family."""
        return {
            family: self._agreed(f"lr[{family!r}]", [block.lr[family] for block in self.blocks]) for family in optimizers.LEARNING_RATES
        }

    @property
    def eps(self) -> sympy.Expr:
        """Factor on Adam's ε."""
        return self._agreed("eps", [block.eps for block in self.blocks])

    @property
    def weight_decay(self) -> sympy.Expr:
        """Factor on AdamW's lr-coupled λ."""
        return self._agreed("weight_decay", [block.weight_decay for block in self.blocks])

    @property
    def role(self) -> Role:
        """What the limits recover: "input", "embedding", "hidden", "output", "vector" or "scalar"."""
        return self._agreed("role", [block.role for block in self.blocks])  # pyright: ignore[reportReturnType]

    def exponent(self, name: str, of: sympy.Symbol = WIDTH) -> sympy.Rational:
        """The power of d that a quantity follows as d→∞, or of L as L→∞: an exact Rational.

        Args:
            name: "init_std", "multiplier", "fan_in", "fan_out", "copies", "eps", "weight_decay", or an optimizer family.
            of: the symbol: `table.width` or `table.depth`.

        Raises:
            MixedBlocks: if the blocks have different exponents.
            UnknownName: if there is no such quantity.
        """
        if name == "multiplier":
            return exponent(self.multiplier, of)
        return self._agreed(name, [block.exponent(name, of) for block in self.blocks])  # pyright: ignore[reportReturnType]


class Law(Record):
    """What a parametrization does to one block of a weight, exact in d, for one optimizer family.

    W_effective = `multiplier`·w, w ~ N(0, `init_std`²) (None: starts at zero), learning rate `lr`, Adam's ε `eps`, lr-coupled decay
    `weight_decay`, and SVC's λ `clip`, by which singular values are multiplied before they are clipped at 1.
    """

    multiplier: Exact = ONE
    init_std: Exact | None = None
    lr: Exact = ONE
    eps: Exact = ONE
    weight_decay: Exact = ONE
    clip: Exact = ONE


class Parametrization(Record):
    """A parametrization of a whole model for one optimizer `family`: per weight one law for each of the table's blocks.

    A law's multiplier is that of the weight's first use. `ties`: of a weight with several uses, the multiplier of each over that of the
    first; where a weight is not in it, the ratios are the table's.
    """

    name: str
    family: str
    laws: dict[str, tuple[Law, ...]]
    ties: dict[str, tuple[Exact, ...]] = {}


class AxisClass(Record):
    """Axes that the graph shows to be the same dimension. `where` has (weight, axis) pairs."""

    size: int
    dims: Exact
    where: tuple[tuple[str, int], ...]
    grows: bool
    known: bool
    reason: str


class Contraction(Record):
    """A product of two activations summed over a growing axis (q·k): it needs the factor 1/`dim`, of which `present` is in the model.

    So does an output that is a sum over the width with no map after it; `dim` is then how large it is.

    `folded`: the weights that carry the rest, or () where nothing could; `both`: they make both factors (h·h), and so carry its root.
    """

    operator: str
    source: Source
    dim: Exact
    present: Exact
    folded: tuple[str, ...]
    both: bool = False

    @property
    def missing(self) -> sympy.Expr:
        """The factor that the model's forward does not have."""
        return 1 / (self.dim * self.present)

    @property
    def carried(self) -> sympy.Expr:
        """What each of the folded weights makes up for."""
        return sympy.sqrt(self.missing) if self.both else self.missing


class Branch(Record):
    """A residual branch f of h + L^-α·f(h), or several alike in `count`.

    `scale` is L^-α and `present` the part of it that the model's own forward has; the rest is in the init and learning rate of the weights
    `folded`, or, where nothing could carry it, `forward` is left: the factor on the output of the module `at` ("" if there is none).
    `weights` are those that act through this branch.
    """

    source: Source
    scale: Exact
    present: Exact = ONE
    folded: tuple[str, ...] = ()
    forward: Exact = ONE
    at: str = ""
    weights: tuple[str, ...] = ()


class Residual(Record):
    """The depth of a table: L is `size` in its model, the number of residual branches that follow each other on the stream.

    `alpha`: a branch is multiplied by L^-α. `shared`: weights of which every branch (of a kind) uses the same one. `on_stream`: weights
    that the stream itself passes once for every addition (post-norm).
    """

    size: int
    alpha: Exact
    branches: tuple[Branch, ...]
    shared: tuple[str, ...] = ()
    on_stream: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> frozenset[str]:
        """All weights whose number grows with depth."""
        return frozenset(self.on_stream).union(*(branch.weights for branch in self.branches))


class Coverage(Record):
    """How much of the model the derivation reached."""

    trainable: int
    reached: int
    unreached: tuple[str, ...] = ()
    operators_without_rule: tuple[str, ...] = ()
    made_up: int = 0


def _formats() -> ModuleType:
    """`scaling.formats`, which is written in terms of this module and so cannot be imported above."""
    from scaling import formats

    return formats


@dataclass(frozen=True, eq=False)
class Trace:
    """What a table was derived from: `scaling.graph.LayerGraph`, `scaling.growth.Growth` (with its axes) and the uses.

    Copies of a table share it; a pickled table, like one in JSON, is without it.
    """

    graph: LayerGraph
    growth: Growth
    uses: tuple[WeightUse, ...]

    def __deepcopy__(self, _: dict[int, Any]) -> Trace:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class ScalingTable(Record):
    """The scaling table: one rule per trainable weight, in model order; a tied alias finds the same rule.

    `size` is the width d of the model the table was derived from; `residual` its depth, where it was derived with `depth`.
    """

    size: int
    rules: tuple[WeightRule, ...]
    classes: tuple[AxisClass, ...] = ()
    contractions: tuple[Contraction, ...] = ()
    coverage: Coverage
    residual: Residual | None = None
    model: str = ""
    notes: tuple[str, ...] = ()
    _trace: Trace | None = PrivateAttr(default=None)

    @property
    def trace(self) -> Trace:
        """The layer graph, its axes and their growth; a table read from JSON has none.

        Raises:
            NoGraph: if the table was not derived in this process.
        """
        if self._trace is None:
            raise NoGraph(self.model)
        return self._trace

    @property
    def traced(self) -> bool:
        """Whether the table was derived in this process, so that its graph is at hand."""
        return self._trace is not None

    def __eq__(self, other: object) -> bool:
        """Equal rules are equal tables, wherever they were derived or read."""
        return isinstance(other, ScalingTable) and all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)

    def __hash__(self) -> int:
        return hash((self.size, self.rules))

    @property
    def width(self) -> sympy.Symbol:
        """The symbol d."""
        return WIDTH

    @property
    def depth(self) -> sympy.Symbol:
        """The symbol L."""
        return DEPTH

    @property
    def depth_size(self) -> int | None:
        """L in this model; None for a table derived without depth."""
        return None if self.residual is None else self.residual.size

    @cached_property
    def _by_name(self) -> dict[str, WeightRule]:
        return {name: rule for rule in self.rules for name in rule.names}

    def __getitem__(self, name: str) -> WeightRule:
        if name not in self._by_name:
            raise UnknownName("weight", name, self._by_name)
        return self._by_name[name]

    def __iter__(self) -> Iterator[WeightRule]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def to_text(self, *, full: bool = False, width: int | None = None) -> str:
        """The table as Unicode text, `width` characters across; repeated blocks on one line unless `full`."""
        return _formats().to_text(self, full=full, width=width)

    def to_markdown(self, *, full: bool = False) -> str:
        """The table as GitHub-flavoured Markdown."""
        return _formats().to_markdown(self, full=full)

    def to_latex(self, *, full: bool = False) -> str:
        """The table as a LaTeX `tabular` that needs no package."""
        return _formats().to_latex(self, full=full)

    def to_html(self, *, full: bool = False) -> str:
        """The table as one self-contained `<div>`."""
        return _formats().to_html(self, full=full)

    def to_dict(self) -> dict[str, Any]:
        """The table in plain values, every rule under its weight's name."""
        return _formats().to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; `from_json` gives back an equal table."""
        return _formats().to_json(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> ScalingTable:
        """The table that `to_json` wrote.

        Raises:
            FormatError: if the text is not such a table.
        """
        return _formats().from_json(text)

    def explain(self, name: str) -> str:
        """The derivation of one weight's rules, step by step, from the operators that use it to the limit d→∞.

        Raises:
            UnknownName: if no weight has this name.
        """
        return _formats().explain(self, name)

    def gauge(self, to: str | Mapping[str, object]) -> ScalingTable:
        """The same dynamics with the forward multipliers elsewhere: an exact abc shift of every rule.

        Args:
            to: "table3", "table8", "table9", "u-mup", or `{weight pattern: multiplier}`; see `scaling.parametrizations.gauge`.

        Raises:
            UnknownName: for an unknown name, or a pattern that matches no weight.
        """
        from scaling import parametrizations

        return parametrizations.gauge(self, to)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return self.to_html()

    def depth_of(self, names: Iterable[str]) -> int | None:
        """The depth L of a model that has the weights `names`: this table's model with fewer blocks, of the same names, or itself.

        None where names do not tell: branches that share their weights, a table without depth, or weights this table does not know.
        """
        known = set(names)
        if self.residual is None or self.residual.shared or not known <= set(self._by_name):
            return None
        whole = sum(known.issuperset(branch.weights) for branch in self.residual.branches)
        size = sympy.Rational(self.residual.size * whole, len(self.residual.branches))
        return int(size) if size.is_Integer and size > 0 else None

    def size_of(self, shapes: dict[str, tuple[int, ...]], *, fewer: bool = False) -> int:
        """The width d at which the table's shapes are the given ones (`name -> shape` of every weight of a model).

        With `fewer` the model may lack some of the table's residual branches.

        Raises:
            WrongWidth: if a weight has another number of axes, or no single d fits all shapes.
        """
        if all(shapes.get(rule.name) == rule.shape for rule in self.rules):
            return self.size
        size = None
        optional = self.residual.weights if fewer and self.residual is not None else ()
        for rule in self.rules:
            if rule.name not in shapes and rule.name in optional:
                continue
            if rule.name not in shapes:
                raise WrongWidth(rule.name, None, f"{rule.dims}", shapes)
            shape = shapes[rule.name]
            if len(shape) != len(rule.dims):
                raise WrongWidth(rule.name, shape, f"{rule.dims}")
            for dim, length in zip(rule.dims, shape, strict=True):
                if size is None and dim.has(WIDTH):
                    roots = [root for root in sympy.solve(dim - length, WIDTH) if root.is_Integer]
                    size = int(roots[0]) if roots else None
                if (size is None and dim.has(WIDTH)) or dim.subs(WIDTH, size or 1) != length:
                    raise WrongWidth(
                        rule.name, shape, f"{rule.dims}" + (f" = {tuple(x.subs(WIDTH, size) for x in rule.dims)}" if size else "")
                    )
        return self.size if size is None else size
