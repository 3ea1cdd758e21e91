"""The benchmark cannot rot: a tiny suite runs through timing, accuracy, JSON, table, figure."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENTERED = ("ours, default", "ours, SN", "ours, default, weights apart", "AdamW, fused", "torch.optim.Muon", "muonium")


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The results of a run of the script on a few contestants, and what it printed."""
    from contextlib import redirect_stdout
    from io import StringIO

    import bench_optimizer
    from bench_results import loaded

    out = tmp_path_factory.mktemp("bench")
    printed = StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(
        bench_optimizer, "TESTED", (("q@89", (48, 48)), ("near rank 1", (48, 48)), ("Gaussian", (32, 96)), ("Gaussian", (96, 32)))
    )
    with redirect_stdout(printed):
        bench_optimizer.main(["--suite", "tiny", "--dtype", "fp32", "--rounds", "3", "--out", str(out), "--only", *ENTERED])
    patch.undo()
    path = next(out.glob("*.json"))
    return loaded(path), printed.getvalue(), path


def test_every_contestant_is_timed_or_says_why_not(ran):
    (race,) = ran[0].races
    assert sorted(timing.name for timing in race.timings) == sorted(ENTERED)
    for timing in race.timings:
        assert bool(timing.why) != (len(timing.milliseconds) > 0), timing
    assert {"ours, default", "ours, SN", "AdamW, fused", "torch.optim.Muon"} <= {timing.name for timing in race.ran}
    assert race.of("muonium") is not None or "muonium: " in ran[1]


def test_accuracy_is_against_the_update_the_contestant_says_it_makes(ran):
    """A tall weight shows it: torch.optim.Muon multiplies its update by √3 there."""
    (accuracy,) = ran[0].accuracies
    assert accuracy.errors["torch.optim.Muon"]["Gaussian 96x32"].norm < 1.25
    assert accuracy.errors["ours, default"]["Gaussian 96x32"].relative < 0.03
    assert accuracy.errors["ours, SN"]["q@89 48x48"].relative < 1e-3
    assert accuracy.errors["ours, default"]["q@89 48x48"].descent > accuracy.errors["torch.optim.Muon"]["q@89 48x48"].descent


def test_the_state_of_ours_is_one_momentum_and_adamws_is_two(ran):
    (race,) = ran[0].races
    bytes_of = {timing.name: timing.state_bytes / (4 * race.parameters) for timing in race.ran}
    assert bytes_of["ours, default"] == 1
    assert bytes_of["AdamW, fused"] == pytest.approx(2, abs=0.01)


def test_figure_and_tables_come_again_from_the_json_alone(ran, capsys):
    import bench_optimizer

    results, printed, path = ran
    figure = path.with_suffix(".png")
    figure.unlink()
    bench_optimizer.main(["--plot-only", "--out", str(path.parent)])
    assert figure.exists()
    assert capsys.readouterr().out == printed
    assert path.read_text() == results.dump()


def test_a_suite_run_again_replaces_its_numbers(ran):
    results = ran[0]
    (race,) = results.races
    assert results.also(race.model_copy(update={"parameters": 1})).races[0].parameters == 1
    slower = race.machine.model_copy(update={"variables": {"ONEDNN_MAX_CPU_ISA": "AVX2"}})
    assert len(results.also(race.model_copy(update={"machine": slower})).races) == 2


def test_gradients_have_the_spectra_they_are_named_after():
    from momenta import SIZE, SPECTRA, matrix, rotating, singular_values

    X = matrix("up@89", (96, 40), torch.Generator().manual_seed(0)).double()
    wanted = SIZE * singular_values(SPECTRA["up@89"], 40)
    torch.testing.assert_close(torch.linalg.svdvals(X), wanted, rtol=1e-4, atol=1e-9)
    full = singular_values(SPECTRA["q@89"], 512)
    assert math.isclose(full.norm(), 1.8123, rel_tol=1e-3)  # ‖·‖_F/σ₁ of the momentum itself
    first, second = rotating([(40, 96)] * 2, 2, torch.float32, torch.Generator().manual_seed(0))
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(torch.linalg.svdvals(first[0]).max(), torch.tensor(SIZE))


@pytest.mark.parametrize(("m", "n"), [(3, 3), (3, 7)])
def test_the_floor_counts_the_products_of_the_iteration(m, n):
    """Against torch's own count of what msign multiplies, in whole products as these are too small to be halved."""
    from contestants import _our_floor
    from torch.utils.flop_counter import FlopCounterMode

    from compiler import msign

    with FlopCounterMode(display=False) as counter:
        msign(torch.randn(m, n))
    assert counter.get_total_flops() == _our_floor("default", torch.device("cpu"))._replace(symmetric=False).flops(m, n).total()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "results").glob("bench_optimizer_*.json")), ids=lambda path: path.stem)
def test_the_committed_numbers_can_be_read(path):
    from bench_results import loaded, report

    results = loaded(path)
    assert results.races
    assert results.accuracies
    assert report(results, results.races, path)
    assert results.dump() == path.read_text()


@pytest.mark.skipif("bench_optimizer" not in (ROOT / "README.md").read_text(), reason="the README has no such table")
def test_the_readme_shows_the_committed_numbers(capsys):
    import bench_optimizer

    bench_optimizer.main(["--markdown", "--device", "cuda", "--suite", "llama-1b", "--dtype", "fp32"])
    table = capsys.readouterr().out.strip()
    assert table
    assert table in (ROOT / "README.md").read_text()


def test_what_the_readme_says_of_cpus_is_in_the_committed_numbers():
    from bench_results import loaded

    results = loaded(EXAMPLES / "results" / "bench_optimizer_cpu.json")
    ratios, descents = [], set()
    for race in results.races:
        peer, errors = next(peer for peer in race.peers if peer.products_in == "fp32"), results.accuracy(race)
        ratios.append(peer.median / race.of("ours, fast").median)
        descents |= {tuple(f"{min(e.descent for e in errors[name].values()):.2f}" for name in ("ours, fast", peer.name))}
    assert len(ratios) == 4
    ((ours, theirs),) = descents
    faster = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as the fastest peer in fp32"
    said = f'`accuracy="fast"` is {faster}, with a descent of {ours} to its {theirs}'
    assert said in " ".join((ROOT / "README.md").read_text().split())
