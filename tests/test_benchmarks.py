"""The benchmarks run, on tiny sizes: what they check, what they write and what they say of it; no times."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("loralib", reason="loralib is not installed, and every benchmark measures it")

from conftest import HAS_TRITON

import fused_lora
from benchmarks import accuracy, host, layers, linear, memory, peers, sweep, test_kernels_speed, timing
from benchmarks.peers import Layer
from benchmarks.report import Results
from benchmarks.timing import Timing

DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on many threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def common(device: str, tmp_path: Path) -> list[str]:
    """Options that every benchmark takes."""
    return ["--device", device, "--output", str(tmp_path), "--commit", "tested"]


def written(folder: Path, name: str) -> tuple[list[dict[str, Any]], str]:
    """The records, after a look that the three files agree, and the readers' file."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["header"]["commit"] == "tested" and content["header"]["torch"] == torch.__version__
    assert "--commit tested" in content["header"]["options"] and content["header"]["cpu"]
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["records"]) and not any("[" in cell for row in rows for cell in row.values())
    text = (folder / f"{name}.md").read_text()
    assert "commit tested" in text
    return content["records"], text


LINEAR = ["--shrink", "64", "--tokens", "24", "--rounds", "1", "--window", "0.01"]


class Graph:
    """Stands for a captured step, which it is told apart by."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def replay(self) -> None: ...


def test_graphs_of_a_step_take_turns_by_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no step profits from where one graph's memory lies; what cannot be captured is called."""
    steps: dict[str, Callable[[], object]] = {name: lambda: None for name in ("one", "other", "called")}
    names, made = {step: name for name, step in steps.items()}, list[Graph]()

    def capture(step: Callable[[], object]) -> Graph:
        made.append(Graph(names[step], sum(graph.name == names[step] for graph in made)))
        return made[-1]

    timed: list[tuple[object, int]] = []
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "run_ms", lambda call, times, device: timed.append((call, times)) or 1.0)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    found = timing.measure(steps, 5, as_called=["called"], window_ms=8.0, burst_rounds=2, captures=3)
    assert [(graph.name, graph.number) for graph in made] == [(name, i) for name in ("one", "other") for i in range(3)]
    assert all(len(each.sustained) == 5 and len(each.burst) == 2 for each in found.values())
    # Windows are eight calls long here; those of a burst three, as is the first of all.
    for name in ("one", "other"):
        windows = [
            call.__self__.number
            for call, times in timed
            if times == 8 and hasattr(call, "__self__") and call.__self__.name == name
        ]
        assert windows == [0, 1, 2, 0, 1]
    assert sum(call is steps["called"] and times == 8 for call, times in timed) == 5


def test_linear_measures_every_peer_and_says_what_it_leaves_out(common: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    chosen = ["--burst-rounds", "1", "--only", "4096x4096", "(T"]
    linear.main([*common, *LINEAR, *chosen, "--r", "16", "64", "--adapter-dtype", "bfloat16", "float32"])
    records, text = written(tmp_path, "linear")
    rows = {(r["shape"], r["candidate"], r["r"], r["adapter_dtype"], r["p"]): r for r in records}
    assert len(rows) == len(records)
    plain, sliced = "64→64", "64→3·64 (T,F,T)"
    for shape in (plain, sliced):
        for r in (16, 64):
            for adapter_dtype in ("bfloat16", "float32"):
                assert {p for s, c, *k, p in rows if (s, c, *k) == (shape, peers.OURS, r, adapter_dtype)} == {0.0, 0.1}
    of_shape = {shape: {c for s, c, *_ in rows if s == shape} for shape in (plain, sliced)}
    assert of_shape[plain] == set(peers.PEERS) and of_shape[sliced] == set(peers.PEERS) - {peers.PEFT}
    assert {r for _, c, r, *_ in rows if c != peers.OURS} == {16}, "peers are measured at the first rank"
    assert peers.NO_SLICES in text and peers.NO_GRAPH in text
    assert all(r["graph"] == (r["candidate"] != peers.LORALIB or r["shape"] == plain) for r in records)
    assert all(r["path"] for r in records if r["candidate"] == peers.OURS)
    assert all(r["sustained_ratio"] > 0 and r["burst_ratio"] > 0 for r in records)


def test_a_wrong_result_prints_no_speed(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = peers.lora_linear
    monkeypatch.setattr(peers, "lora_linear", lambda *a, scaling, **k: right(*a, scaling=1.1 * scaling, **k))
    with pytest.raises(AssertionError, match=r"fused_lora .* y is off"):
        linear.main([*common, *LINEAR, "--burst-rounds", "0", "--only", "4096x4096", "--peers"])
    assert not list(tmp_path.iterdir()) and "ratio" not in capsys.readouterr().out


def our_row(**changes: Any) -> dict[str, Any]:
    row = {"candidate": peers.OURS, "shape": "4096→4096", "tokens": 8192, "dtype": "bfloat16"}
    return row | {"adapter_dtype": "bfloat16", "r": 16, "p": 0.1, "sustained_ratio": 1.11} | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.12),
        ({"p": 0.0}, 1.10),
        ({"shape": "4096→1024", "p": 0.0}, 1.28),
        ({"shape": "4096→3·4096 (T,F,T)"}, 1.08),
        ({"dtype": "float16", "adapter_dtype": "float16"}, 1.12),
        ({"r": 64}, 1.11 + 0.04),
        ({"r": 128}, 1.11 + 0.08),
        ({"adapter_dtype": "float32"}, 1.11 + 0.01),
        ({"r": 128, "adapter_dtype": "float32"}, 1.11 + 0.09),
        ({"tokens": 2048}, None),
        ({"r": 32}, None),
        ({"r": 64, "p": 0.0}, None),
        ({"shape": "64→64"}, None),
    ],
    ids=str,
)
def test_targets(changes: dict[str, Any], expected: float | None) -> None:
    """The rows for wide ranks and float32 adapters refer to a measured one, here of p = 0.1 alone."""
    row = our_row(**changes)
    aim = linear.target(row, [our_row(), row])
    assert aim == (None if expected is None else pytest.approx(expected))


def test_ratios_are_to_the_bare_layer() -> None:
    row = linear.ratios(Timing([3.0, 9.0, 6.0], [8.0]), Timing([2.0], [2.0]))
    assert (row["sustained_ratio"], row["burst_ratio"]) == (3.0, 4.0)
    assert "burst_ratio" not in linear.ratios(Timing([3.0]), Timing([2.0]))


@pytest.fixture(params=[(True,), (True, False, True)], ids=["plain", "sliced"])
def small_layer(request: pytest.FixtureRequest, device: str) -> Layer:
    return Layer.random(40, 48, 96, 4, 0.0, DTYPE, enable_lora=request.param, device=device)


@pytest.mark.parametrize("adapter_dtype", [DTYPE, torch.float32], ids=str)
@pytest.mark.parametrize("name", [peers.OURS, peers.ADDMM, peers.LORALIB])
def test_every_peer_computes_the_same(small_layer: Layer, adapter_dtype: torch.dtype, name: str) -> None:
    layer = small_layer.with_adapter(4, 0.0, adapter_dtype)
    step = peers.PEERS[name](layer)
    accuracy.check(layer, {name: step})
    assert [t.dtype for t in step()] == [DTYPE, DTYPE, adapter_dtype, adapter_dtype]


@pytest.mark.parametrize("wrong", range(4), ids=accuracy.NAMES)
@pytest.mark.parametrize("how", ["scaled", "nan"])
def test_the_check_sees_each_result(small_layer: Layer, wrong: int, how: str) -> None:
    right = peers.PEERS[peers.OURS](small_layer)

    def step() -> tuple[Tensor, ...]:
        results = list(right())
        results[wrong] = results[wrong].clone()
        # The last row, which a check of a few rows must reach too.
        results[wrong][-1] *= float("nan") if how == "nan" else 1.5
        return tuple(results)

    accuracy.check(small_layer, {"right": right}, rows=3)
    with pytest.raises(AssertionError, match=f"wrong: {accuracy.NAMES[wrong]} is off"):
        accuracy.check(small_layer, {"wrong": step}, rows=3)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_exact_results_are_those_of_the_expression(small_layer: Layer, p: float) -> None:
    """The yardstick's bound grows with an error of its own, so that only this would see one."""
    tensors = {name: getattr(small_layer, name).detach().double() for name in ("x", "weight", "lora_A", "lora_B", "dy")}
    for name in ("x", "lora_A", "lora_B"):
        tensors[name].requires_grad_()
    wide = replace(small_layer, p=p, **tensors)
    keep, q, _ = accuracy.mask_and_seed(wide)
    rows = torch.tensor([0, 7, 39], device=wide.x.device)
    y, dx, da, db = accuracy.unfused(wide, keep, q)
    for actual, expected in zip(accuracy.exact(wide, keep, q, rows), (y[rows], dx[rows], da, db), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (keep is None) == (p == 0)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("first_wrong", [1, 2, 3])
def test_the_check_sees_what_is_wrong_once_it_is_repeated(small_layer: Layer, p: float, first_wrong: int) -> None:
    """And a layer of ours with dropout, which is timed too; others' masks nobody knows."""
    layer = replace(small_layer, p=p)
    right, calls = peers.PEERS[peers.OURS](layer), 0

    def step() -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        results = right()
        return results if calls <= first_wrong else (results[0] * 1.1, *results[1:])

    accuracy.check(layer, {peers.OURS: right})
    with pytest.raises(AssertionError, match=f"{peers.OURS}: y is off"):
        accuracy.check(layer, {peers.OURS: step})
    accuracy.check(layer, {peers.LORALIB: peers.PEERS[peers.LORALIB](layer)})


def test_an_adapter_that_is_dropped_with_dropout_is_seen(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = fused_lora.Linear.forward

    def wrong(self: Any, x: Tensor) -> Tensor:
        y = forward(self, x)
        return nn.functional.linear(x, self.weight) + 0 * y if isinstance(self.lora_dropout, nn.Dropout) else y

    monkeypatch.setattr(fused_lora.Linear, "forward", wrong)
    with pytest.raises(AssertionError, match=r"fused_lora: y is off"):
        linear.main([*common, *LINEAR, "--burst-rounds", "0", "--only", "4096x4096", "--peers"])
    with pytest.raises(AssertionError, match=r"auto: y is off"):
        sweep.main([*common, *SWEEP, "--tokens", "5", "--p", "0.1"])
    assert not list(tmp_path.iterdir())


def test_a_trial_on_a_cpu_does_not_replace_results(capsys: pytest.CaptureFixture[str]) -> None:
    for measured in (linear, sweep, host, memory, layers):
        with pytest.raises(SystemExit):
            measured.main(["--device", "cpu"])
        assert "--output is benchmarks/results; expected another folder" in capsys.readouterr().err


@pytest.mark.parametrize("measured", [linear, sweep, host, memory, layers], ids=lambda module: module.__name__)
def test_what_nobody_has_is_not_measured(measured: Any, common: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        measured.main([*common, "--only", "17x17"])
    assert not list(tmp_path.iterdir())


def test_the_check_knows_the_mask(small_layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = replace(small_layer, p=0.5)
    accuracy.check(layer, {})
    monkeypatch.setattr(accuracy, "fused_with_seed", lambda layer, seed: peers.fused_with_seed(layer, seed + 1))
    with pytest.raises(AssertionError, match="is off"):
        accuracy.check(layer, {})


SWEEP = ["--shrink", "64", "--r", "8", "--only", "4096x1024", "--rounds", "1", "--window", "0.01"]


def test_sweep_measures_each_point_in_both_modes(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "MOST_WEIGHTS", 2)
    options = ["--confirm-window", "0.01", "--tokens", "5", "600", "--p", "0", "0.1", "--backends", "auto,reference"]
    sweep.main([*common, *SWEEP, *options])
    records, text = written(tmp_path, "sweep")
    wanted = {(t, p, mode) for t in (5, 600) for p in (0.0, 0.1) for mode in ("graph", "eager")}
    assert len(records) == 8 and {(r["tokens"], r["p"], r["mode"]) for r in records} == wanted
    for record in records:
        times = {backend: record[f"{backend}_ms"] for backend in ("auto", "reference")}
        assert record["fastest"] == min(times, key=times.__getitem__)
        assert record["ratio"] == pytest.approx(times["auto"] / record["eager_ms"])
        full = record["mode"] == "eager" or record["short_ratio"] > 1 - sweep.CLEARLY
        assert (record["short_ratio"] is None) == (record["mode"] == "eager")
        assert len(record["auto_rounds_ms"]) == (sweep.CONFIRM_ROUNDS if full else 1)
    lost = len(sweep.losses(records))
    assert f"**{lost} of 8 measured" in text and "0 points not measured" in text


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_sweep_forces_the_kernels(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(sweep, "CONFIRM_ROUNDS", 1)
    options = ["--confirm-window", "0.01", "--tokens", "3", "--p", "0.1", "--modes", "eager", "--backends", "triton"]
    sweep.main([*common, *SWEEP, *options])
    records, _ = written(tmp_path, "sweep")
    assert [r["path"] for r in records] == ["triton"]


def test_sweep_says_what_it_had_no_time_for(common: list[str], tmp_path: Path) -> None:
    sweep.main([*common, *SWEEP, "--quick", "--seconds", "0"])
    records, text = written(tmp_path, "sweep")
    points = len(sweep.QUICK_TOKENS) * 2
    assert not records and f"{points} points not measured" in text and "64→16 M=16384: 2" in text


def test_a_resumed_sweep_measures_the_other_points(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(sweep, "CONFIRM_ROUNDS", 1)
    options = [*common, *SWEEP, "--confirm-window", "0.01", "--modes", "eager"]
    sweep.main([*options, "--tokens", "3", "--p", "0.1", "--name", "part"])
    (kept,), _ = written(tmp_path, "part")
    both = [*options, "--tokens", "3", "5", "--p", "0.1", "--resume", str(tmp_path / "part.json")]
    sweep.main(both)
    records, text = written(tmp_path, "sweep")
    assert records[0] == kept and [r["tokens"] for r in records] == [3, 5] and "--name part" in text
    assert "of 2 measured" in text and "0 points not measured" in text
    with pytest.raises(ValueError, match="whose commit is tested; expected other"):
        sweep.main([*both, "--commit", "other"])


def test_a_loss_is_more_than_noise() -> None:
    rows = [{"ratio": ratio} for ratio in (0.5, 1.02, 1.021, 3.0)]
    assert [row["ratio"] for row in sweep.losses(rows)] == [3.0, 1.021]


def test_a_forced_backend_is_the_one_that_runs(device: str) -> None:
    step = peers.fused(Layer.random(4, 16, 16, 2, 0.0, torch.float32, device=device))
    assert peers.path_of(peers.on_backend(step, "reference")) == "reference"
    assert peers.on_backend(step, "auto") is step


def test_host_times_both_packages_layers(common: list[str], tmp_path: Path) -> None:
    host.main([*common, "--shrink", "64", "--rounds", "2", "--calls", "2"])
    records, text = written(tmp_path, "host")
    ours = {(r["layer"], r["p"]) for r in records if r["candidate"] == "fused_lora"}
    assert len(ours) == 6 and ours == {(r["layer"], r["p"]) for r in records if r["candidate"] == "loralib"}
    assert {layer for layer, _ in ours} == {r["layer"] for r in records if r["candidate"] == "frozen"}
    assert all(0 < r["forward_us"] < r["total_us"] for r in records if r["candidate"] != "frozen")
    assert text.count("| less |") + text.count("| MORE |") == 6


def test_layers_times_every_layer_of_both_packages(common: list[str], tmp_path: Path) -> None:
    layers.main([*common, "--shrink", "64", "--rounds", "1", "--window", "0.01"])
    records, text = written(tmp_path, "layers")
    candidates: dict[str, set[str]] = {}
    for record in records:
        candidates.setdefault(record["layer"], set()).add(record["candidate"])
    without = {"frozen", "fused_lora, p=0.0", "loralib, p=0.0"}
    for layer, found in candidates.items():
        masked = {"fused_lora, p=0.1", "loralib, p=0.1"} if layer.startswith("MergedLinear") else set()
        assert found == without | masked and f"| {layer} | frozen |" in text, layer
    assert {name.split()[0] for name in candidates} == {"MergedLinear", "Embedding", "Conv2d"}


class KnownSavings(nn.Module):
    """Saves its buffer once for x's gradient, its output for two exponentials, and x for the parameter's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8))
        self.register_buffer("constant", torch.ones(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        shifted = (x * self.factor * self.constant).exp()
        return shifted.exp() + shifted.view(-1).exp().view(3, 8)


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    numbers = 3 * 8 * 4
    # Beside x: the constant, `shifted` (saved by exp, of which it is the result) and the results of the other two.
    assert memory.saved_bytes(KnownSavings(), x) == (numbers, 4 * numbers)


def test_memory_keeps_its_promise(common: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    memory.main([*common, "--shrink", "32", "--tokens", "64"])
    records, text = written(tmp_path, "memory")
    ours = [r for r in records if r["candidate"].startswith(peers.OURS)]
    assert len(ours) == 8 and all(0 < r["saved_bytes"] <= r["promised_bytes"] for r in ours) and "BROKEN" not in text
    x_bytes = {64 * 128 * 2}
    assert {r["x_bytes"] for r in ours} == x_bytes
    peft = [r for r in records if r["candidate"].startswith(peers.PEFT)]
    as_it_comes = [r for r in peft if "float32" in r["candidate"]]
    # A float32 copy of x, or what dropout makes of it, is the least that PEFT keeps as it comes.
    assert len(as_it_comes) == 4 and all(r["saved_bytes"] >= 64 * 128 * 4 for r in as_it_comes)
    others = {r["p"]: r["saved_bytes"] for r in peft if "bfloat16" in r["candidate"]}
    # With adapters of the base's dtype it is their panel alone, and with dropout what that makes of x and its mask.
    assert others[0.0] == 64 * 16 * 2 and others[0.1] >= 64 * 128 * 3
    assert all(r["saved_bytes"] == r["x_bytes"] == 0 for r in records if r["candidate"] == "frozen")


def test_a_broken_promise_is_shown() -> None:
    row = {"shape": "a", "candidate": peers.OURS, "p": 0.0, "x_bytes": 1, "saved_bytes": 3, "promised_bytes": 2}
    results = Results("title", {}, [row | {"saved_bits_per_element": 1.0}])
    memory.add_table(results)
    assert "BROKEN" in results.text()


MODEL = ["--batch", "2", "--sequence", "12", "--layers", "2", "--hidden", "32", "--intermediate", "48", "--r", "4"]
MODEL += ["--heads", "4", "--kv-heads", "2", "--vocab", "64", "--rounds", "1", "--window", "0.01"]


@pytest.fixture
def model() -> Any:
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks import model

    return model


def test_model_trains_every_candidate(common: list[str], tmp_path: Path, model: Any) -> None:
    model.main([*common, *MODEL, "--no-compile"])
    records, text = written(tmp_path, "model")
    expected = [model.FROZEN, *(c for c in model.PEFT_VARIANTS if not c.compiled), *model.OURS]
    assert [r["candidate"] for r in records] == [str(candidate) for candidate in expected]
    # Of a layer: 32 to 32 and back for q and o, to 16 for k and v, to 48 thrice, once from there; by r = 4, two layers.
    parameters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert {r["adapter_parameters"] for r in records} == {0, parameters}
    assert all(r["path"] for r in records if r["candidate"].startswith("fused_lora"))
    assert text.count("met |") + text.count("MISSED |") == 6


def test_what_is_compiled_is_held_against_what_is(model: Any) -> None:
    times = {"frozen": 2.0, "frozen, compiled": 1.0, "PEFT, bfloat16 adapters, compiled": 3.0}
    times |= {"fused_lora, bfloat16 adapters": 2.4, "fused_lora, bfloat16 adapters, compiled": 1.5}
    results = Results("", {})
    results.records += [{"candidate": name, "ms": ms, "peak_bytes": None, "path": ""} for name, ms in times.items()]
    model.add_findings(results, 8)
    verdicts = [line.split(" | ")[1:4] for line in results.sections[1].splitlines()[2:]]
    best = "speed over the best of PEFT (PEFT, bfloat16 adapters, compiled)"
    assert verdicts == [
        ["time over that of: frozen", "1.200", "≤ 1.10"],
        [best, "1.250", "≥ 1.05"],
        ["time over that of: frozen, compiled", "1.500", "≤ 1.10"],
        [best, "2.000", "≥ 1.05"],
    ]


def test_model_compiles(common: list[str], tmp_path: Path, model: Any) -> None:
    model.main([*common, *MODEL, "--compile-backend", "aot_eager", "--only", "PEFT, bfloat16 adapters, compiled"])
    records, _ = written(tmp_path, "model")
    assert [r["candidate"] for r in records] == ["PEFT, bfloat16 adapters, compiled"]


def test_models_share_the_base_and_have_adapters_of_their_own(common: list[str], model: Any) -> None:
    base = model.base_model(model.options_of([*common, *MODEL]))
    weights = {p.data_ptr() for p in base.parameters()}
    everything: list[nn.Parameter] = []
    for candidate in (*model.PEFT_VARIANTS[:2], *model.OURS):
        built, adapters = model.build(base, candidate, 4, 0.1)
        assert {p.data_ptr() for p in built.parameters()} - weights == {p.data_ptr() for p in adapters}
        assert [p for p in built.parameters() if p.requires_grad] == adapters
        assert {p.dtype for p in adapters} == {candidate.adapter_dtype} and len(adapters) == 2 * 7 * 2
        everything += adapters
    assert len({p.data_ptr() for p in everything}) == len(everything)
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("fault", ["scaling", "one projection without its adapter"])
def test_a_wrong_model_prints_no_speed(
    common: list[str], tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right: Callable[..., fused_lora.Linear] = model.fused_projection

    def wrong(linear: nn.Linear, *arguments: Any) -> fused_lora.Linear:
        layer = right(linear, *arguments)
        if fault == "scaling":
            layer.scaling *= 1.1
        elif linear.in_features == 48:
            layer.scaling = 0.0
        return layer

    monkeypatch.setattr(model, "fused_projection", wrong)
    with pytest.raises(AssertionError, match=r"fused_lora.*is off by"):
        model.main([*common, *MODEL, "--no-compile"])
    assert not list(tmp_path.iterdir())


def test_plots_are_drawn_from_the_result_files(common: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    from benchmarks import plots

    linear.main([*common, *LINEAR, "--burst-rounds", "0", "--only", "4096x"])
    memory.main([*common, "--shrink", "64", "--tokens", "16"])
    plots.main(["--results", str(tmp_path)])
    for name in ("linear", "memory"):
        image = (tmp_path / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG") and 10_000 < len(image) < 150_000


def test_the_linear_plot_shows_each_ratio() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import plots

    rows = [our_row(p=p, target=1.12) for p in (0.0, 0.1)]
    rows += [our_row(candidate=peers.LORALIB, p=p, sustained_ratio=1.39) for p in (0.0, 0.1)]
    rows.append(our_row(r=64, sustained_ratio=9.0))
    figure = plots.draw_linear({"gpu": "G", "torch": "T", "commit": "C"}, rows)
    assert [[bar.get_height() for bar in axes.patches] for axes in figure.axes] == [[1.11, 1.39]] * 2


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_kernels_calls_run(device: str) -> None:
    layer = Layer.random(24, 32, 48, 4, 0.5, DTYPE, device=device)
    for names, calls in (
        (test_kernels_speed.FORWARD, test_kernels_speed.forward_calls(layer)),
        (test_kernels_speed.BACKWARD, test_kernels_speed.backward_calls(layer)),
        (test_kernels_speed.FEW_ROWS, test_kernels_speed.few_rows_calls(layer)),
        (test_kernels_speed.UPDATE, test_kernels_speed.update_calls(layer)),
    ):
        assert tuple(calls) == names
        for call in calls.values():
            call()
