import html.parser
import itertools
import json
import re

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling import errors, optimizers
from scaling.explain import explain, limit
from scaling.folding import fold, template
from scaling.formats import FORMATS, from_json, to_dict, to_html, to_json, to_latex, to_markdown, to_text
from scaling.limits import WIDTH, exact, leading
from scaling.notation import Code, decided, formula
from scaling.records import AxisClass, Block, Contraction, Coverage, Factor, ScalingTable, Source, Use, WeightRule
from scaling.sheet import COLUMNS, sheet, slice_text

d = WIDTH
SIZE = 768
ONE = sympy.Integer(1)


# --- tables by hand ---------------------------------------------------------------------------------------------------------------------


def axis(size, part, start=0, stop=None):
    return (Factor(size=size, part=part, start=start, stop=size if stop is None else stop),)


def source(line, code="self.f(x)", module=""):
    return Source(file="model.py", line=line, code=code, module=module)


def make(names, axes, *, uses=(), operator="aten.linear", at=1, notes=(), **values):
    names = (names,) if isinstance(names, str) else names
    block = Block(axes=axes, **values)
    use = Use(operator=operator, source=source(at), **values)
    dims = tuple(sympy.Mul(*(factor.size for factor in one)) for one in axes)
    return rule_of(names, dims, (use, *uses), (block,), notes)


def rule_of(names, dims, uses, blocks, notes=()):
    shape = tuple(int(sympy.sympify(dim).subs(d, SIZE)) for dim in dims)
    return WeightRule(names=names, shape=shape, dims=dims, uses=uses, blocks=blocks, notes=notes)


def linear(names, out, into, **values):
    return make(names, (axis(out, "out"), axis(into, "in")), fan_in=into, fan_out=out, **values)


def bias(names, out, **values):
    return make(names, (axis(out, "out"),), fan_in=1, fan_out=out, **values)


def gain(names, of):
    return make(names, (axis(of, "copy"),), fan_in=1, fan_out=1, copies=of, operator="aten.layer_norm")


def lookup(names, rows, out, uses=()):
    axes = (axis(rows, "lookup"), axis(out, "out"))
    return make(names, axes, fan_in=1, fan_out=out, lookup=True, operator="aten.embedding", uses=uses)


def fused(name, parts, into, targets=None):
    """q, k, v side by side along axis 0."""
    total, ends = sympy.Add(*parts), list(itertools.accumulate(parts))
    blocks = tuple(
        Block(axes=(axis(total, "out", end - part, end), axis(into, "in")), fan_in=into, fan_out=part, target=target)
        for part, end, target in zip(parts, ends, targets or [ONE] * len(parts), strict=True)
    )
    use = Use(operator="aten.linear", source=source(5, "self.c_attn(x)", name.removesuffix(".weight")), fan_in=into, fan_out=total)
    return rule_of((name,), (total, into), (use,), blocks)


def table_of(*rules, **values):
    return ScalingTable(
        size=SIZE, rules=rules, coverage=values.pop("coverage", Coverage(trainable=len(rules), reached=len(rules))), **values
    )


def gpt(layers=12, kv=d, folded=False):
    """A GPT with fused qkv, a tied head and, where `folded`, 12 heads whose size grows."""
    head = Use(
        operator="aten.linear", source=source(41, "F.linear(x, self.wte.weight)"), fan_in=d, fan_out=65, multiplier=sympy.sqrt(65) / d
    )
    rules = [lookup(("wte.weight", "lm_head.weight"), 65, d, (head,)), lookup("wpe.weight", 256, d)]
    for i in range(layers):
        rules += [
            gain(f"h.{i}.ln.weight", d),
            bias(f"h.{i}.ln.bias", d, operator="aten.layer_norm"),
            fused(f"h.{i}.attn.c_attn.weight", [d, kv, kv], d, [sympy.sqrt(12 / d), ONE, ONE] if folded else None),
            linear(f"h.{i}.attn.c_proj.weight", d, d),
            linear(f"h.{i}.mlp.c_fc.weight", 4 * d, d),
            linear(f"h.{i}.mlp.c_proj.weight", d, 4 * d),
        ]
    hub = AxisClass(
        size=SIZE,
        dims=d,
        where=(
            ("wte.weight", 1),
            ("wpe.weight", 1),
            *((f"h.{i}.{name}.weight", 0) for i in range(layers) for name in ("ln", "attn.c_proj")),
        ),
        grows=True,
        known=False,
        reason="the axis most matrices use",
    )
    vocabulary = AxisClass(size=65, dims=65, where=(("wte.weight", 0),), grows=False, known=True, reason="looked up")
    hidden = [
        AxisClass(size=4 * SIZE, dims=4 * d, where=((f"h.{i}.mlp.c_fc.weight", 0),), grows=True, known=False, reason=f"seen in h.{i}.mlp")
        for i in range(layers)
    ]
    products = [
        Contraction(
            operator="aten.scaled_dot_product_attention",
            source=source(7, "F.scaled_dot_product_attention(q, k, v)", f"h.{i}.attn"),
            dim=d / 12,
            present=sympy.sqrt(12 / d),
            folded=(f"h.{i}.attn.c_attn.weight",),
        )
        for i in range(layers if folded else 0)
    ]
    return table_of(*rules, classes=(hub, vocabulary, *hidden), contractions=tuple(products), model="GPT")


def cnn():
    def conv(name, out, into, taps, copies=1):
        axes = (
            axis(out if copies == 1 else copies, "out" if copies == 1 else "copy"),
            axis(into, "in"),
            axis(taps, "in"),
            axis(taps, "in"),
        )
        return make(name, axes, fan_in=into * taps**2, fan_out=out, copies=copies, operator="aten.conv2d.default")

    return table_of(
        conv("stem.weight", d, 3, 3), conv("depthwise.weight", 1, 1, 3, d), conv("mix.weight", 2 * d, d, 1), linear("fc.weight", 10, 2 * d)
    )


def interleaved():
    """Heads × (q, k, v) × head_dim along axis 0, with a smaller target for q."""
    blocks = tuple(
        Block(
            axes=((*axis(d / 64, "out"), *axis(3, "out", i, i + 1), *axis(64, "out")), axis(d, "in")),
            fan_in=d,
            fan_out=d,
            target=ONE / 8 if i == 0 else 1,
        )
        for i in range(3)
    )
    return table_of(rule_of(("qkv.weight",), (3 * d, d), (Use(operator="aten.linear", source=source(3), fan_in=d, fan_out=3 * d),), blocks))


def scalars():
    return table_of(make("scale", (), fan_in=1, fan_out=1, operator="aten.mul"), notes=("a | note with `ticks`, <tags> & 100% of_it_",))


TABLES = {
    "gpt": gpt(),
    "gpt with folded attention": gpt(folded=True),
    "gpt with grouped queries": gpt(kv=d / 4),
    "cnn": cnn(),
    "interleaved": interleaved(),
    "scalars": scalars(),
    "empty": table_of(),
}


@pytest.fixture(params=TABLES.values(), ids=TABLES.keys())
def table(request):
    return request.param


def row(table, start, **options):
    """The line of the wide text table that begins with `start`."""
    lines = [line for line in to_text(table, width=400, **options).split("\n") if line.strip().startswith(start)]
    assert lines, f"no line begins with {start}"
    return re.split(r" {2,}", lines[0].strip())


def footer(table, title, **options):
    lines = to_text(table, width=1000, **options).split("\n")
    after = lines[lines.index(title) + 1 :]
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), after)]


# --- every format -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_every_weight_once_folding_is_off(name):
    write = FORMATS[name]
    text = write(TABLES["gpt"], full=True) if name != "json" else write(TABLES["gpt"])
    text = text.replace("\\_", "_")
    for weight in ("wte.weight", "lm_head.weight", "h.0.attn.c_attn.weight", "h.11.mlp.c_proj.weight"):
        assert weight in text


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_writes_every_table(name, table):
    text = FORMATS[name](table)
    assert isinstance(text, str)
    assert "Min" not in text or name == "json"
    assert "**" not in text or name in ("json", "markdown")
    assert not re.search(r"\d\.\d|\x1b", text.replace("0.5em", "").split("</style>")[-1]), "no floats, no escape codes"


def test_the_table_itself_is_its_text_and_its_html():
    table = TABLES["gpt"]
    assert str(table) == repr(table) == table.to_text() == to_text(table)
    assert table._repr_html_() == table.to_html() == to_html(table)
    assert table.to_markdown(full=True) == to_markdown(table, full=True)
    assert table.to_latex() == to_latex(table)
    assert table.to_dict() == to_dict(table)
    assert table.to_json(indent=None) == to_json(table, indent=None)
    assert table.explain("lm_head.weight") == explain(table, "lm_head.weight")


# --- what a line says -------------------------------------------------------------------------------------------------------------------


def test_a_hidden_matrix_shows_shape_fans_and_factors():
    cells = ["h.[0-11].mlp.c_fc.weight ×12", "4d × d", "d", "4d", "1", "1/√d", "4", "1/d", "2", "hidden", "linear: sums d, emits 4d"]
    assert row(TABLES["gpt"], "h.[0-11].mlp.c_fc") == cells


def test_a_contracting_matrix_keeps_its_finite_factors():
    assert row(TABLES["gpt"], "h.[0-11].mlp.c_proj")[5:9] == ["1/(4√d)", "1/4", "1/(4d)", "1/2"]


def test_an_output_shows_the_minimum_and_no_matrix_factor():
    assert row(TABLES["cnn"], "fc.weight")[4:] == ["√(min(1, 5/d)/(2d))", "5/d", "1/(2d)", "(adam)", "output", "linear: sums 2d, emits 10"]


def test_the_columns_are_named_after_the_attributes():
    expected = ("shape", "fan_in", "fan_out", "multiplier", "init_std", "lr sgd", "lr adam", "lr muon", "role", "why")
    assert sheet(TABLES["gpt"]).columns == expected


def test_a_multiplier_column_is_there_only_if_some_weight_has_one():
    assert "multiplier" not in sheet(TABLES["cnn"]).columns
    assert row(TABLES["gpt"], "wte.weight")[4] == "√65/d"


def test_a_tied_weight_shows_both_names_and_both_uses():
    text = to_text(TABLES["gpt"], width=400)
    assert "\n  = lm_head.weight\n" in text
    assert row(TABLES["gpt"], "wte.weight")[-1] == "embedding: lookup of 65 rows; linear: sums d, emits 65, times √65/d"


def test_muon_shows_a_factor_for_exactly_the_weights_that_grow_both_ways(table):
    page = sheet(table)
    at, role = page.columns.index("lr muon"), page.columns.index("role")
    for line in page.lines:
        if line.cells[role]:
            assert (line.cells[at] != ("(adam)",)) == (line.cells[role] == ("hidden",))
    assert ("leaves this weight to AdamW" in to_text(table)) == any(line.cells[at] == ("(adam)",) for line in page.lines)


def test_copies_are_shown():
    assert row(TABLES["gpt"], "h.[0-11].ln.weight")[-1] == "layer_norm: gain, d copies"
    assert row(TABLES["cnn"], "depthwise.weight")[-1] == "conv2d: sums 9, emits 1, d copies"


def test_input_and_output_sizes_other_than_one_are_shown():
    table = table_of(linear("fc", d, d, target=2, input_scale=1 / sympy.sqrt(d), multiplier=ONE / 2))
    assert row(table, "fc")[-1] == "linear: sums d, emits d, times 1/2, of input RMS 1/√d, of output RMS 2"


def test_a_bias_and_a_scalar_say_so():
    assert row(TABLES["gpt"], "h.[0-11].ln.bias")[-1] == "layer_norm: one per output"
    assert row(TABLES["scalars"], "scale")[-1] == "mul: one number"


def test_a_minimum_that_every_width_decides_is_not_printed():
    assert row(table_of(bias("bias", 4 * d)), "bias")[4] == "1"
    assert decided(sympy.sqrt(sympy.Min(1, 65 / d))) == sympy.sqrt(sympy.Min(1, 65 / d))
    assert decided(sympy.Max(d, ONE / 2)) == d


def test_a_weight_used_often_in_one_way_says_how_often():
    use = Use(operator="aten.linear", source=source(2), fan_in=d, fan_out=d)
    assert row(table_of(linear("shared.weight", d, d, uses=(use, use))), "shared")[-1] == "linear: sums d, emits d (3 uses)"


def test_an_optimizer_that_is_registered_gets_a_column_and_a_derivation(monkeypatch):
    def frobenius(use):
        """U = G/‖G‖_F, of unit norm."""
        return optimizers.muon(use)

    monkeypatch.setitem(optimizers.LEARNING_RATES, "frobenius", frobenius)
    assert "lr frobenius" in sheet(TABLES["cnn"]).columns
    assert "U = G/‖G‖_F" in explain(TABLES["cnn"], "fc.weight")
    text = to_json(TABLES["cnn"])
    monkeypatch.undo()
    with pytest.raises(errors.FormatError, match="frobenius"):
        from_json(text)


# --- blocks -----------------------------------------------------------------------------------------------------------------------------


def test_blocks_of_one_rule_take_one_line():
    assert row(TABLES["gpt"], "h.[0-11].attn.c_attn")[1:4] == ["3d × d", "d", "d"]
    assert row(TABLES["gpt"], "h.[0-11].attn.c_attn")[-1] == "linear: sums d, emits d (3 blocks)"


def test_blocks_of_several_rules_take_a_line_each():
    table = TABLES["gpt with grouped queries"]
    assert row(table, "h.[0-11].attn.c_attn") == ["h.[0-11].attn.c_attn.weight ×12", "3d/2 × d", "linear: 3 blocks with rules of their own"]
    for label, factor in (("[0:d, :]", "1"), ("[d:5d/4, :]", "1/4"), ("[5d/4:3d/2, :]", "1/4")):
        assert row(table, label)[6] == factor
    assert "  [d:5d/4, :]" in to_text(table)


def test_an_interleaved_block_is_labelled_by_its_factors():
    assert row(TABLES["interleaved"], "[(:, 0:1, :), :]")[-1] == "sums d, emits d, of output RMS 1/8"


@given(st.lists(st.sampled_from([d, d / 4, 64 * ONE, 2 * d]), min_size=2, max_size=4))
def test_slice_labels_follow_one_another(parts):
    rule = fused("w", parts, d)
    bounds = [slice_text(block)[1:4:2] for block in rule.blocks if block.slices[0] != slice(0, sympy.Add(*parts))]
    assert [stop for _, stop in bounds] == list(itertools.accumulate(parts))


# --- folding ----------------------------------------------------------------------------------------------------------------------------


def unfold(line):
    choices = [
        [str(i) for part in piece.split(",") for a, _, b in [part.partition("-")] for i in range(int(a), int(b or a) + 1)]
        if re.fullmatch(r"[\d,-]+", piece)
        else [piece]
        for piece in re.split(r"\[|\]", line)
    ]
    return {"".join(pieces) for pieces in itertools.product(*choices)}


names = st.lists(
    st.tuples(st.sampled_from(["h", "layers"]), st.integers(0, 12), st.sampled_from(["attn", "experts.3", "w"]), st.integers(0, 3)).map(
        lambda parts: ".".join(map(str, parts))
    ),
    min_size=1,
    max_size=40,
)


@given(names)
def test_folded_lines_stand_for_exactly_their_names(names):
    lines = [unfold(line) for line in fold(names)]
    assert set.union(*lines) == set(names)
    assert sum(map(len, lines)) == len(set(names)), "no name is on two lines"


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30), min_size=1))
def test_a_full_grid_of_indices_folds_into_one_line(outer, inner):
    assert len(fold(f"a.{i}.b.{j}.w" for i in outer for j in inner)) == 1


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w"], ["h.0.w"]),
        (["h.0.w", "h.1.w", "h.2.w"], ["h.[0-2].w"]),
        (["h.0.w", "h.2.w", "h.4.w"], ["h.[0,2,4].w"]),
        (["h.0.w", "h.1.w", "h.2.w", "h.3.w", "h.5.w"], ["h.[0-3,5].w"]),
        (["h.10.w", "h.9.w"], ["h.[9-10].w"]),
        (["layer1.w", "layer2.w"], ["layer1.w", "layer2.w"]),
        (["conv3d.0.weight", "0.weight", "2.weight"], ["conv3d.0.weight", "[0,2].weight"]),
        (["s.0.b.0.w", "s.0.b.1.w", "s.1.b.0.w", "s.1.b.1.w", "s.2.b.0.w"], ["s.[0-1].b.[0-1].w", "s.2.b.0.w"]),
        (["carried (in h.0)", "carried (in h.1)"], ["carried (in h.[0-1])"]),
    ],
)
def test_folding(names, folded):
    assert fold(names) == folded


def test_a_template_leaves_every_index_open():
    assert template("h.0.experts.12.w1") == "h.[].experts.[].w1"


def test_layers_that_differ_do_not_fold():
    rules = [linear(f"h.{i}.w", 4 * d if i == 2 else d, d) for i in range(4)]
    assert row(table_of(*rules), "h.[0-1,3].w")[0] == "h.[0-1,3].w ×3"
    assert row(table_of(*rules), "h.2.w")[1] == "4d × d"


def test_ties_across_layers_fold_too():
    rules = [linear((f"a.{i}.w", f"b.{i}.w"), d, d) for i in range(3)]
    assert "a.[0-2].w ×3" in to_text(table_of(*rules))
    assert "\n  = b.[0-2].w\n" in to_text(table_of(*rules), width=400)


def test_full_gives_every_weight_its_line(table):
    full = sheet(table, full=True)
    assert [line.names[0] for line in full.lines if not line.part] == [(Code(rule.name),) for rule in table]
    assert sum(line.weights for line in sheet(table).lines if not line.part) == len(table)


# --- under the table --------------------------------------------------------------------------------------------------------------------


def test_the_footer_states_the_width():
    assert footer(TABLES["gpt"], "Width") == ["d = 768 in this model (GPT)"]


def test_the_footer_states_every_axis_class_and_how_to_flip_a_guess():
    lines = footer(TABLES["gpt"], "Axes")
    assert lines[0] == (
        "d = 768: grows, guessed (the axis most matrices use); "
        "wte.weight[1], wpe.weight[1], h.[0-11].ln.weight[0], h.[0-11].attn.c_proj.weight[0]"
    )
    assert lines[1] == "65: fixed, known (looked up); wte.weight[0]"
    assert lines[2] == "4d = 3072 ×12: grows, guessed (seen in h.[0-11].mlp); h.[0-11].mlp.c_fc.weight[0]"
    assert lines[3] == 'name[axis] is guessed wrong? flip it: derive(model, fixed={"wte.weight": 1})'
    assert len(footer(TABLES["gpt"], "Axes", full=True)) == len(TABLES["gpt"].classes) + 1


def test_a_class_of_many_places_names_a_few_unless_full():
    many = AxisClass(size=8, dims=8, where=tuple((f"w{i}", 0) for i in range(9)), grows=False, known=False, reason="small")
    table = table_of(classes=(many,))
    assert footer(table, "Axes")[0] == "8: fixed, guessed (small); w0[0], w1[0], w2[0], and 6 more"
    assert "w8[0]" in footer(table, "Axes", full=True)[0]
    assert footer(table, "Axes")[1].endswith('derive(model, grows={"w0": 0})')


def test_nothing_is_to_flip_where_all_is_known():
    known = AxisClass(size=8, dims=8, where=(("w", 0),), grows=False, known=True, reason="")
    assert footer(table_of(classes=(known,)), "Axes") == ["8: fixed, known; w[0]"]


def test_a_product_of_activations_names_the_weight_that_carries_its_factor():
    (line,) = footer(TABLES["gpt with folded attention"], "Products of two activations summed over a growing axis")
    assert line == (
        "scaled_dot_product_attention ×12 sums over d/12: needs the factor 12/d, has √(12/d); the missing √(12/d) is in the rule of "
        "h.[0-11].attn.c_attn.weight (at model.py:7: F.scaled_dot_product_attention(q, k, v))"
    )


@pytest.mark.parametrize(("present", "says"), [(1 / d, "which follows it"), (1 / sympy.sqrt(d), "multiply by it in the forward")])
def test_a_product_that_nothing_carries_says_what_to_do(present, says):
    product = Contraction(operator="aten.bmm", source=source(1), dim=d, present=present, folded=())
    assert says in footer(table_of(contractions=(product,)), "Products of two activations summed over a growing axis")[0]


def test_notes_of_repeated_layers_fold():
    table = table_of(*(linear(f"h.{i}.w", d, d, notes=(f"carries h.{i}.q",)) for i in range(3)), notes=("of the table",))
    assert footer(table, "Notes") == ["of the table", "h.[0-2].w: carries h.[0-2].q"]
    assert len(footer(table, "Notes", full=True)) == 4


def test_the_footer_states_what_was_not_reached():
    coverage = Coverage(trainable=5, reached=3, unreached=("h.0.dead", "h.1.dead"), operators_without_rule=("aten.cumsum",), made_up=2)
    lines = footer(table_of(coverage=coverage), "Coverage")
    assert lines[0] == "3 of 5 trainable weights have a rule"
    assert lines[1] == "without one: h.[0-1].dead"
    assert lines[2] == "operators without a signature: aten.cumsum"
    assert lines[3].startswith("2 integers")


# --- text -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 110, 120, 140, 200])
def test_text_keeps_to_the_page(table, width):
    assert max(map(len, to_text(table, width=width).split("\n"))) <= width


@pytest.mark.parametrize("width", [40, 100, 120, 400])
def test_wrapping_loses_no_character(width):
    def letters(text):
        return sorted(char for char in text if not char.isspace() and char != "─")

    assert letters(to_text(TABLES["gpt"], width=width)) == letters(to_text(TABLES["gpt"], width=1000))


def test_names_wrap_at_their_dots():
    name = "transformer.blocks.attention.projection.weight"
    lines = to_text(table_of(linear(name, d, d)), width=100).split("\n")
    parts = [line.split("  ")[0] or line.strip().split("  ")[0] for line in lines[3 : lines.index(lines[2], 3)]]
    assert "".join(parts) == name
    assert len(parts) > 1
    assert all(part.endswith(".") for part in parts[:-1])


def test_on_a_narrow_page_the_why_stands_below():
    lines = to_text(TABLES["gpt"], width=90).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("wpe.weight"))
    assert lines[at + 1] == "    embedding: lookup of 256 rows"


# --- Markdown, HTML, LaTeX --------------------------------------------------------------------------------------------------------------


def test_markdown_rows_have_as_many_cells_as_columns(table):
    rows = [line for line in to_markdown(table).split("\n") if line.startswith("|")]
    assert len(rows) == 2 + len(sheet(table).lines)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {len(sheet(table).columns) + 2}


def test_markdown_escapes_what_it_would_read():
    assert "a | note with \\`ticks\\`, \\<tags> & 100% of_it_" in to_markdown(TABLES["scalars"])


def test_a_pipe_in_a_name_does_not_end_its_cell():
    assert "| `a\\|b` |" in to_markdown(table_of(linear("a|b", d, d)))


def test_code_with_backticks_gets_a_longer_fence():
    product = Contraction(operator="aten.bmm", source=source(1, "f(`x`)"), dim=d, present=ONE, folded=())
    assert "`` model.py:1: f(`x`) ``" in to_markdown(table_of(contractions=(product,))).replace("f(`x`)``", "f(`x`) ``").replace(
        "``model", "`` model"
    )


class Page(html.parser.HTMLParser):
    """Raises where a tag is not closed in order; collects the cells of each row, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "code", "br", "details", "summary", "ul", "li"}
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.text += data


def test_html_is_well_formed(table):
    page = Page(to_html(table))
    assert page.rows == [len(sheet(table).columns) + 1] * (1 + len(sheet(table).lines))


def test_html_escapes_what_it_would_read():
    assert "a | note with `ticks`, <tags> & 100% of_it_" in Page(to_html(TABLES["scalars"])).text
    assert "<tags>" not in to_html(TABLES["scalars"])


def test_html_is_self_contained():
    assert not re.search(r"http|<script|<link|src=", to_html(TABLES["gpt"]))


def test_latex_is_balanced(table):
    text = to_latex(table)
    assert all(text.count(rf"\begin{{{name}") == text.count(rf"\end{{{name}") for name in ("tabular", "itemize"))
    bare = re.sub(r"\\.", "", text)
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(char, 0) for char in bare))
    assert min(depth, default=0) >= 0
    assert depth[-1] == 0
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[#%^~]", re.sub(r"\$[^$]*\$", "", bare)), "no command character outside of math"


def test_latex_rows_have_as_many_cells_as_columns(table):
    body = to_latex(table).split(r"\end{tabular}")[0]
    rows = [line for line in body.split("\n") if line.endswith(r"\\")]
    assert len(rows) == 1 + len(sheet(table).lines)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {len(sheet(table).columns)}


def test_latex_formulas_can_be_typeset(table):
    mathtext = pytest.importorskip("matplotlib.mathtext")
    formulas = set(re.findall(r"\$[^$]+\$", to_latex(table)))
    assert formulas or not table.rules
    for text in formulas:
        mathtext.MathTextParser("path").parse(text)


# --- formulas ---------------------------------------------------------------------------------------------------------------------------


def read_formula(text):
    """The exact expression that the printed one stands for."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "**" + "".join(str("⁰¹²³⁴⁵⁶⁷⁸⁹".index(c)) for c in m[0]), text)
    text = re.sub(r"√(\w+)", r"√(\1)", text).replace("^", "**").replace("·", "*")
    text = re.sub(r"(?<=[\w)])(?=√)|(?<=\d)(?=[(a-z])|(?<=\))(?=[\w(])", "*", text)
    return exact(text.replace("√", "sqrt").replace("min", "Min").replace("max", "Max"))


sizes = st.sampled_from([ONE, 3 * ONE, 9 * ONE, 27 * ONE, 65 * ONE, d, 4 * d, d / 12, 3 * d / 2, 2 * d + 64, 9 * d, d**2])


@settings(deadline=None)
@given(sizes, sizes, st.sampled_from([0, 1, -1, 2, -2, 3, -3]), st.booleans())
def test_a_printed_formula_is_the_expression(a, b, halves, clipped):
    expression = sympy.sqrt(a) ** halves * (sympy.Min(1, a / b) if clipped else 1) * sympy.sqrt(b) / b
    assert sympy.simplify(read_formula(formula(expression)) / expression) == 1


@pytest.mark.parametrize(
    ("expression", "printed"),
    [
        ("sqrt(Min(1, 65/d)/d)", "√(min(1, 65/d)/d)"),
        ("1/sqrt(d)", "1/√d"),
        ("1/(4*sqrt(d))", "1/(4√d)"),
        ("sqrt(65)/d", "√65/d"),
        ("sqrt(65/d)", "√(65/d)"),
        ("sqrt(12/d)", "√(12/d)"),
        ("sqrt(Rational(1, 27))", "1/(3√3)"),
        ("d**Rational(3, 2)", "d√d"),
        ("d**Rational(-3, 2)", "1/(d√d)"),
        ("d**2/2", "d²/2"),
        ("cbrt", "cbrt"),
        ("d**Rational(1, 3)", "d^(1/3)"),
        ("3*d/2", "3d/2"),
        ("(d + 64)/d", "(d + 64)/d"),
        ("(d + 1)**2", "(d + 1)²"),
        ("64 - d", "64 - d"),
        ("copies*fan_out/fan_in", "copies·fan_out/fan_in"),
        ("2*fan_in", "2·fan_in"),
        ("-1/2", "-1/2"),
        ("0", "0"),
    ],
)
def test_formulas_read_as_papers_write_them(expression, printed):
    assert formula(exact(expression)) == printed


# --- JSON -------------------------------------------------------------------------------------------------------------------------------

values = {
    "multiplier": [ONE, 1 / d, sympy.sqrt(65) / d],
    "target": [ONE, 1 / sympy.sqrt(d)],
    "input_scale": [ONE, d],
    "copies": [ONE, d, 8 * ONE],
}
maps = st.fixed_dictionaries({"fan_in": sizes, "fan_out": sizes, **{name: st.sampled_from(some) for name, some in values.items()}})
sources = st.builds(Source, file=st.text(), line=st.integers(0, 10**6), code=st.text(), module=st.text())


@st.composite
def rules(draw):
    dims = draw(st.lists(sizes, max_size=3))
    parts = st.sampled_from(["in", "out", "copy", "lookup"])
    blocks = [
        Block(axes=tuple(axis(dim, draw(parts)) for dim in dims), lookup=draw(st.booleans()), **draw(maps))
        for _ in range(draw(st.integers(1, 3)))
    ]
    uses = [
        Use(operator=draw(st.text()), source=draw(sources), lookup=draw(st.booleans()), **draw(maps))
        for _ in range(draw(st.integers(1, 2)))
    ]
    return rule_of(
        tuple(draw(st.lists(st.text(), min_size=1, max_size=3))), tuple(dims), tuple(uses), tuple(blocks), tuple(draw(st.lists(st.text())))
    )


def test_names_with_brackets_fold_like_any_other():
    assert fold(["[]", "h.0.[]", "h.1.[]"]) == ["[]", "h.[0-1].[]"]


@settings(deadline=None, max_examples=40)
@given(st.lists(rules(), max_size=3, unique_by=lambda rule: rule.name), st.lists(st.text(), max_size=2))
def test_json_gives_the_same_table_back(rules, notes):
    table = table_of(*rules, notes=tuple(notes))
    assert from_json(to_json(table)) == table
    assert to_text(from_json(to_json(table, indent=None))) == to_text(table)


def test_json_gives_the_example_tables_back(table):
    assert ScalingTable.from_json(table.to_json()) == table
    assert ScalingTable.from_json(table.to_json(indent=None).encode()) == table


def test_json_has_formulas_by_weight_name_for_other_frameworks():
    data = json.loads(to_json(TABLES["gpt"]))
    assert data["format"] == "spectral-mup scaling table 1"
    assert (data["width"], data["size"], data["model"]) == ("d", 768, "GPT")
    weight = data["weights"]["h.3.mlp.c_proj.weight"]
    assert weight["lr"] == {"sgd": "1/4", "adam": "1/(4*d)", "muon": "1/2"}
    assert weight["init_std"] == "1/(4*sqrt(d))"
    assert weight["exponents"] == {
        "fan_in": "1", "fan_out": "1", "copies": "0", "init_std": "-1/2", "multiplier": "0", "eps": "-1", "weight_decay": "1",
        "sgd": "0", "adam": "-1", "muon": "0",
    }  # fmt: skip
    assert (weight["shape"], weight["dims"], weight["role"]) == ([768, 3072], ["d", "4*d"], "hidden")
    assert eval(weight["init_std"], {"sqrt": lambda x: x**0.5, "Min": min, "Max": max, "d": 1024}) == 1 / 128
    assert list(data["weights"]) == [rule.name for rule in TABLES["gpt"]]


def test_a_weight_whose_blocks_differ_has_no_value_of_its_own():
    weight = to_dict(TABLES["gpt with grouped queries"])["weights"]["h.0.attn.c_attn.weight"]
    assert weight["fan_out"] is None
    assert weight["lr"] == {"sgd": None, "adam": "1/d", "muon": None}
    assert weight["exponents"]["sgd"] == "0"
    assert [block["lr"]["sgd"] for block in weight["blocks"]] == ["1", "1/4", "1/4"]
    assert weight["fan_in"] == "d"


def edited(path, value):
    data = to_dict(TABLES["gpt"])
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[1, 2]", 'no "format"'),
        ('{"weights": {}}', 'no "format"'),
        ('{"format": "spectral-mup scaling table 9"}', "this version reads 'spectral-mup scaling table 1'"),
        ('{"format": "spectral-mup scaling table 1"}', "weights"),
        ('{"format": "spectral-mup scaling table 1", "weights": {}}', "Field required"),
        (
            edited(["weights", "wte.weight", "lr", "adam"], "1/d"),
            r"'1/d' where the rest of it makes '1'\n  at \['weights'\]\['wte.weight'\]\['lr'\]",
        ),
        (edited(["weights", "wte.weight", "role"], "output"), "'output' where the rest of it makes 'embedding'"),
        (edited(["weights", "other.weight"], to_dict(TABLES["gpt"])["weights"]["wte.weight"]), r"at \['weights'\]"),
        (edited(["weights", "wte.weight", "blocks", 0, "fan_out"], "__import__('os')"), "not an exact expression"),
        (edited(["weights", "wte.weight", "blocks", 0, "fan_out"], "2 +"), "SyntaxError"),
        (edited(["weights", "wte.weight", "blocks", 0, "fan_out"], 0.5), "float"),
        (edited(["weights", "wte.weight"], None), "one of its"),
        (edited(["size"], "wide"), "size"),
        (edited(["comment"], "mine"), "comment"),
    ],
)
def test_from_json_rejects_what_is_no_table(text, match):
    with pytest.raises(errors.FormatError, match=match):
        from_json(text)


# --- explain ----------------------------------------------------------------------------------------------------------------------------


def test_explain_goes_from_the_axes_to_the_limit():
    text = explain(TABLES["cnn"], "fc.weight")
    titles = re.findall(r"^\d\. (.*)$", text, re.MULTILINE)
    assert titles == ["The axes", "The uses", "The spectral condition", "The initial entries", "The learning rates", "The limit d→∞"]
    for line in (
        "axis 1: 2d = 1536, grows; summed over",
        "linear at model.py:1: self.f(x)",
        "fan_in = 2d, fan_out = 10",
        "‖W‖₂ = ‖ΔW‖₂ = √(fan_out/fan_in) = √(5/d)",
        "init_std σ = √(min(1, fan_out/fan_in)/fan_in) = √(min(1, 5/d)/(2d))",
        "‖U‖₂ ≍ √(d/5), η_sgd = fan_out/fan_in = 5/d",
        "η_adam = 1/fan_in = 1/(2d)",
        "η_muon = √(fan_out/fan_in) = √(5/d); only with matrices='all'",
        "lim d·σ = √(5/2), as √(min(1, 5/d)/(2d)) is √(5/2)/d for large d: σ ∝ 1/d",
        "(-1, -1, -1): output weights; role 'output'",
        "arXiv 2310.17813",
    ):
        assert line in text


def test_explain_says_how_each_axis_is_known_to_grow():
    text = re.sub(r"\n\s+", " ", explain(TABLES["gpt"], "wte.weight"))
    assert "65 is fixed (known: looked up); the same dimension as wte.weight[0]" in text
    assert "d grows (guessed: the axis most matrices use); the same dimension as wte.weight[1], wpe.weight[1]" in text


def test_explain_of_a_tied_weight_has_both_uses_and_what_reconciles_them():
    text = explain(TABLES["gpt"], "lm_head.weight")
    assert text == explain(TABLES["gpt"], "wte.weight")
    assert text.startswith("wte.weight = lm_head.weight\n")
    assert "model.py:41: F.linear(x, self.wte.weight)" in text
    assert "one weight, 2 uses, which want ‖W‖₂ = ‖ΔW‖₂ = √d and √(65/d)" in text
    assert "the one multiplier √65/d" in text


def test_explain_of_a_fused_weight_has_one_derivation_for_blocks_of_one_rule():
    text = explain(TABLES["gpt with grouped queries"], "h.0.attn.c_attn.weight")
    assert "[0:d, :]: ‖W‖₂ = ‖ΔW‖₂ = √(fan_out/fan_in) = 1\n" in text
    assert "[d:5d/4, :], [5d/4:3d/2, :]: ‖W‖₂ = ‖ΔW‖₂ = √(fan_out/fan_in) = 1/2\n" in text
    assert explain(TABLES["gpt"], "h.0.attn.c_attn.weight").count("init_std σ") == 1


def test_explain_of_a_folded_factor_names_the_product_and_its_source_line():
    text = explain(TABLES["gpt with folded attention"], "h.3.attn.c_attn.weight")
    assert "scaled_dot_product_attention at model.py:7: F.scaled_dot_product_attention(q, k, v)  (in h.3.attn)" in text
    assert "it needs the factor 12/d" in text
    assert "(-1, -1, -3/2): none, as the multiplier or the RMS of its input or output is not 1" in text
    assert "scaled_dot_product" not in explain(TABLES["gpt with folded attention"], "h.3.attn.c_proj.weight")


def test_explain_explains_every_weight(table):
    for rule in table:
        assert "The limit d→∞" in explain(table, rule.names[-1])


def test_explain_of_an_unknown_name_lists_the_known_ones():
    with pytest.raises(errors.UnknownName, match=r"unknown weight 'fc'; known: stem.weight, .*fc.weight"):
        explain(TABLES["cnn"], "fc")


@settings(deadline=None, max_examples=60)
@given(maps)
def test_the_printed_limit_agrees_with_the_exponent_calculus(values):
    block = Block(axes=(), **values)
    for expression in (block.init_std, *block.lr.values()):
        power, value, resolved = limit(expression)
        assert (value, power) == leading(expression)
        assert not resolved.has(sympy.Min)


def test_every_weight_column_but_shape_and_why_is_in_one_visible_table():
    assert set(sheet(TABLES["cnn"]).columns) - {"shape", "why"} <= set(COLUMNS) | {f"lr {family}" for family in optimizers.LEARNING_RATES}
