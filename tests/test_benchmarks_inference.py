"""The benchmarks of inference run, on tiny sizes: what they check, what they write and what they say; no times."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("loralib", reason="loralib is not installed, and every benchmark measures it")

import fused_lora
from benchmarks import inference, inference_cases
from benchmarks.inference import AS_CALLED, GRAPHS
from benchmarks.inference_cases import ADDMM, COMPILED, EAGER, FUSED, INVARIANT, MERGED, Embeddings, Linears, copies
from benchmarks.report import Results


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on many threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def common(device: str, tmp_path: Path) -> list[str]:
    return ["--device", device, "--output", str(tmp_path), "--commit", "tested"]


TINY = ["--shrink", "64", "--rounds", "1", "--window-ms", "0.01", "--called-window-ms", "0.01"]
TINY += ["--compile-backend", "aot_eager"]


def written(folder: Path, name: str) -> tuple[list[dict[str, Any]], str]:
    """The records, after a look that the files agree, and the readers' file."""
    content = json.loads((folder / f"{name}.json").read_text())
    assert content["header"]["commit"] == "tested"
    with (folder / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(content["records"])
    return content["records"], (folder / f"{name}.md").read_text()


def test_every_layer_is_measured_at_every_point(common: list[str], tmp_path: Path) -> None:
    chosen = ["--tokens", "1", "70", "--ranks", "8", "64", "--compile-tokens", "70", "--shapes", "4096x4096", "14336x"]
    inference.main([*common, *TINY, *chosen])
    records, text = written(tmp_path, "inference")
    keys = ("layer", "r", "tokens", "mode", "candidate")
    found = [tuple(row[key] for key in keys) for row in records]
    expected = {
        (layer, r, tokens, mode, candidate)
        for layer in ("64→64", "224→64")
        for r in (8, 64)
        for tokens in (1, 70)
        for mode in (GRAPHS, AS_CALLED)
        for candidate in (MERGED, EAGER, ADDMM, FUSED, COMPILED if tokens == 70 else INVARIANT)
    }
    expected |= {
        (layer, 16, tokens, mode, candidate)
        for layer in ("MergedLinear 64→3·64 (T,F,T)", "Embedding 2004x64")
        for tokens in (1, 70)
        for mode in (GRAPHS, AS_CALLED)
        for candidate in (MERGED, ADDMM, FUSED, *([INVARIANT] if tokens == 1 and "Linear" in layer else []))
    }
    assert len(found) == len(set(found)) and set(found) == expected
    assert all(row["path"] for row in records if row["candidate"] == FUSED)
    # A line for each point of a mode.
    assert text.count("\n| 64→64 | ") == 8 and text.count("\n| Embedding 2004x64 | 16 | ") == 4


def test_a_cpu_claims_no_time(tmp_path: Path) -> None:
    chosen = ["--tokens", "1", "--no-compile", "--quick", "--modes", "graphs"]
    inference.main(["--device", "cpu", "--output", str(tmp_path), "--commit", "tested", *TINY, *chosen])
    records, text = written(tmp_path, "inference")
    assert records and not any(key in row for row in records for key in ("us", "ratio", "gb_per_s", "rounds_us"))
    assert "not judged" in text and not any(word in text for word in ("met", "MISSED", "LOSES", "GB/s", "TFLOP"))
    assert not (tmp_path / "inference.png").exists()


@pytest.mark.parametrize(
    ("part", "fault"),
    [("linear", "Linear"), ("layers", "MergedLinear"), ("layers", "Embedding"), ("linear", "addmm")],
)
def test_a_wrong_result_prints_no_speed(
    common: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    fault: str,
) -> None:
    if fault == "addmm":
        right = inference_cases.base_addmm
        monkeypatch.setattr(inference_cases, "base_addmm", lambda *tensors: 1.05 * right(*tensors))
    else:
        layer = getattr(fused_lora, fault)
        forward = layer.forward

        def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
            self.scaling = 1.1 * inference_cases.SCALING
            return forward(self, x)

        monkeypatch.setattr(layer, "forward", wrong)
    with pytest.raises(AssertionError, match=r"(64→.*|Embedding.*): off by"):
        inference.main([*common, *TINY, "--part", part, "--tokens", "3", "--no-compile"])
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and said.count(": right;") == (1 if fault == "Embedding" else 0)


def test_a_copy_that_is_another_prints_no_speed(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = inference_cases.fused_module
    made: list[Any] = []
    monkeypatch.setattr(inference_cases, "fused_module", lambda *a, **k: made.append(right(*a, **k)) or made[0])
    with pytest.raises(AssertionError, match=r"64→.*, fused: off by"):
        inference.main([*common, *TINY, "--part", "linear", "--tokens", "70", "--no-compile"])
    assert not list(tmp_path.iterdir())


def test_what_there_was_no_time_for_is_said(common: list[str], tmp_path: Path) -> None:
    inference.main([*common, *TINY, "--part", "linear", "--ranks", "16", "--tokens", "1", "2", "--seconds", "0"])
    records, text = written(tmp_path, "inference")
    assert not records and "8 points not measured: 64→64 r=16 M=1;" in text


def test_candidates_can_be_chosen(common: list[str], tmp_path: Path) -> None:
    chosen = ["--part", "linear", "--tokens", "2", "--ranks", "8", "--shapes", "x1024"]
    for text, expected in (("addmm", {MERGED, ADDMM}), ("fused", {MERGED, FUSED})):
        inference.main([*common, *TINY, *chosen, "--candidates", text])
        records, _ = written(tmp_path, "inference")
        assert {row["candidate"] for row in records} == expected
    with pytest.raises(SystemExit):
        inference.main([*common, *TINY, "--shapes", "17x17"])


@pytest.mark.parametrize(
    ("nbytes", "cache", "expected"),
    [
        (32 << 20, 50 << 20, 5),
        (8 << 20, 50 << 20, 19),
        (112 << 20, 50 << 20, 4),
        (3 << 30, 50 << 20, 2),
        (9 << 30, 50 << 20, 1),
        (8 << 20, 0, 4),
        (1 << 10, 50 << 20, 64),
    ],
)
def test_a_cycle_of_copies_exceeds_the_cache_and_stays_in_memory(nbytes: int, cache: int, expected: int) -> None:
    assert copies(nbytes, cache) == expected


@pytest.fixture
def cases(device: str) -> dict[str, inference_cases.Case]:
    return {
        "Linear": Linears(64, 96, 4, device).case(5, "eager"),
        "MergedLinear": Linears(64, 96, 4, device, (True, False, True)).case(5),
        "Embedding": Embeddings(50, 64, 4, device).case(5),
    }


def test_the_copies_are_their_own_and_differ(cases: dict[str, inference_cases.Case]) -> None:
    """So that none finds another's weight in the cache, nor passes for another."""
    for name in ("Linear", "MergedLinear"):
        for candidate, calls in cases[name].calls.items():
            assert len(calls) >= inference_cases.FEWEST_COPIES
            if candidate in (FUSED, INVARIANT):
                layers = [call.func if candidate == FUSED else call.args[0] for call in calls]
                tensors = [list(layer.parameters()) for layer in layers]
            else:
                tensors = [[t for t in call.args[1:] if isinstance(t, torch.Tensor)] for call in calls]
            of_calls = [{t.data_ptr() for t in of_call} for of_call in tensors]
            assert len(set().union(*of_calls)) == sum(map(len, of_calls)), candidate
            assert not any(torch.equal(calls[0](), call()) for call in calls[1:]), candidate
    with torch.inference_mode():
        ours, base = (cases["Linear"].calls[name] for name in (FUSED, MERGED))
        assert {call.func.weight.data_ptr() for call in ours} == {call.args[1].data_ptr() for call in base}


def test_every_size_is_compiled(device: str) -> None:
    """Dynamo runs a function as it is, without an error, after so many sizes."""
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        sizes.append(inputs[0].shape)
        return graph.forward

    linears = Linears(64, 96, 4, device)
    for tokens in range(1, 12):
        for call in linears.case(tokens, backend).calls[COMPILED]:
            call()
    assert sizes == [(tokens, 64) for tokens in range(1, 12)]


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding"])
def test_the_check_sees_each_candidate(cases: dict[str, inference_cases.Case], name: str) -> None:
    case = cases[name]
    inference.check(case, name)
    for candidate, turn in product(case.calls, (0, 2)):
        right = case.calls[candidate][turn]

        def wrong(right: inference_cases.Call = right) -> torch.Tensor:
            y = right().clone()
            y[-1, -1] = float("nan")
            return y

        calls = list(case.calls[candidate])
        calls[turn] = wrong
        broken = replace(case, calls=case.calls | {candidate: calls})
        if candidate == MERGED:
            inference.check(broken, name)
        else:
            with pytest.raises(AssertionError, match=f"{name}, .*: off by"):
                inference.check(broken, name)


def test_the_truth_is_the_layers_in_float64(cases: dict[str, inference_cases.Case]) -> None:
    """The yardstick's bound grows with an error of its own, so that only this would see one."""
    for case in cases.values():
        module, x = case.calls[FUSED][0].func, case.calls[FUSED][0].args[0]
        wide = module.double()
        torch.testing.assert_close(case.truth(0), wide(x if x.dtype == torch.int64 else x.double()), rtol=0, atol=1e-12)


def our_row(**changes: Any) -> dict[str, Any]:
    row = {"part": "linear", "layer": "4096→4096", "tokens": 1, "r": 16, "mode": GRAPHS, "candidate": FUSED}
    row |= {"path": "triton", "us": 10.0, "ratio": 1.0, "gb_per_s": 3000.0, "tflop_per_s": 2.0}
    return row | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.00),
        ({"tokens": 16}, 1.00),
        ({"layer": "14336→4096"}, 1.05),
        ({"layer": "4096→1024", "r": 64}, 1.10),
        ({"tokens": 32}, 1.10),
        ({"tokens": 256}, 1.10),
        ({"tokens": 512}, None),
        ({"tokens": 2048}, 1.06),
        ({"tokens": 8192, "r": 64}, 1.11),
        ({"r": 8}, None),
        ({"mode": AS_CALLED}, None),
        ({"candidate": ADDMM}, None),
        ({"layer": "64→64"}, None),
    ],
    ids=str,
)
def test_goals(changes: dict[str, Any], expected: float | None) -> None:
    assert inference.goal(our_row(**changes)) == (None if expected is None else pytest.approx(expected))


def timed_rows(fused_us: float, unfused_us: float = 16.0, **changes: Any) -> list[dict[str, Any]]:
    times = {MERGED: 10.0, EAGER: 20.0, ADDMM: unfused_us, FUSED: fused_us}
    rows = [our_row(candidate=name, us=us, ratio=us / 10, **changes) for name, us in times.items()]
    return [row | {"goal": inference.goal(row)} for row in rows]


@pytest.mark.parametrize(
    ("fused_us", "unfused_us", "said"),
    [
        (10.0, 16.0, ["≤ 1.00 met", "0.625 (base + addmm_)", "1 of 1 goals met; 0 of 1 points lose"]),
        (10.1, 16.0, ["≤ 1.00 MISSED", "0 of 1 goals met"]),
        (10.2, 10.0, ["1.020 (base + addmm_)", "0 of 1 points lose"]),
        (10.3, 10.0, ["1.030 LOSES (base + addmm_)", "1 of 1 points lose"]),
        (30.0, 24.0, ["1.500 LOSES (eager)"]),
    ],
)
def test_the_table_says_what_is_met_and_what_loses(fused_us: float, unfused_us: float, said: list[str]) -> None:
    results = Results("title", {}, timed_rows(fused_us, unfused_us))
    inference.add_tables(results)
    for text in said:
        assert text in results.text()


def test_the_rate_is_of_the_memory_or_of_arithmetic() -> None:
    assert inference.rate(our_row(tokens=256)) == "10.00, 3000 GB/s"
    assert inference.rate(our_row(tokens=512, us=50.0, tflop_per_s=600.0)) == "50.0, 600 TFLOP/s"
    assert inference.rate(our_row(tokens=512, tflop_per_s=0.0)) == "10.00, 3000 GB/s"


def test_the_plot_shows_each_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import plots

    layers = ("4096→4096", "4096→1024", "4096→14336")
    rows = [row for layer in layers for tokens in (1, 64, 512) for row in timed_rows(11.0, layer=layer, tokens=tokens)]
    rows += timed_rows(90.0, r=64) + timed_rows(90.0, mode=AS_CALLED) + timed_rows(90.0, part="layers")
    results = Results("title", {"gpu": "G", "torch": "T", "commit": "C"}, rows)
    results.write(tmp_path, "some")
    figure = plots.draw_inference(results.header, rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(layers)
    for axes in figure.axes:
        lines = {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines[:4]}
        expected = {EAGER: [2.0] * 3, ADDMM: [1.6] * 3, FUSED: [1.1] * 3}
        assert lines == expected | {"goal": [1.0 if axes.get_title(loc="left") == layers[0] else 1.05, 1.1]}
    plots.save(tmp_path, "inference", "some")
    image = (tmp_path / "some.png").read_bytes()
    assert image.startswith(b"\x89PNG") and 10_000 < len(image) < 150_000


DECODING = ["--shrink", "128", "--heads", "4", "--kv-heads", "2", "--layers", "2", "--r", "4", "--rounds", "1"]
DECODING += ["--prompt", "5", "--new-tokens", "6"]


@pytest.fixture
def decoding() -> Any:
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks import decoding

    return decoding


def test_decoding_measures_every_candidate(common: list[str], tmp_path: Path, decoding: Any) -> None:
    decoding.main([*common, *DECODING, "--batch", "1", "3"])
    records, text = written(tmp_path, "decoding")
    names = [decoding.MERGED, decoding.UNFUSED, decoding.FUSED]
    assert [(row["batch"], row["candidate"]) for row in records] == [(b, name) for b in (1, 3) for name in names]
    assert [bool(row["path"]) for row in records] == [False, False, True] * 2
    assert all(f"| {b} | {name} | " in text for b in (1, 3) for name in names)


def test_decoding_on_a_cpu_claims_no_time(tmp_path: Path, decoding: Any) -> None:
    decoding.main(["--device", "cpu", "--output", str(tmp_path), "--commit", "tested", *DECODING, "--batch", "1"])
    records, text = written(tmp_path, "decoding")
    assert len(records) == 3 and not any("ms" in row or "ratio" in row for row in records)
    assert "met" not in text and "MISSED" not in text


@pytest.mark.parametrize("fault", ["fused", "merged"])
def test_a_wrong_decoder_prints_no_speed(
    common: list[str], tmp_path: Path, decoding: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = decoding.models

    def wrong(base: torch.nn.Module, r: int) -> dict[str, torch.nn.Module]:
        found = right(base, r)
        attention = next(model for name, model in found.items() if name.startswith(fault)).model.layers[-1].self_attn
        if fault == "fused":
            attention.o_proj.scaling["default"] *= 1.2
        else:
            attention.o_proj.weight.data.mul_(1.2)
        return found

    monkeypatch.setattr(decoding, "models", wrong)
    with pytest.raises(AssertionError, match=f"{fault}.*: logits are off by"):
        decoding.main([*common, *DECODING, "--batch", "2"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def candidates(common: list[str], decoding: Any) -> dict[str, torch.nn.Module]:
    options = decoding.options_of([*common, *DECODING])
    return decoding.models(decoding.base_model(options), options.r)


@torch.inference_mode()
def test_a_decoder_gives_what_the_model_gives_without_a_cache(
    candidates: dict[str, torch.nn.Module], decoding: Any, device: str
) -> None:
    model: Any = candidates[decoding.UNFUSED].double()
    prompt, tokens = (torch.randint(250, (2, length), device=device) for length in (5, 4))
    decoder = decoding.Decoder(model, prompt, 4, graph=False)
    expected = model(input_ids=torch.cat([prompt, tokens], 1)).logits
    # Twice, since a text is decoded again and again.
    for _ in range(2):
        torch.testing.assert_close(decoding.given_logits(decoder, tokens), expected, rtol=0, atol=1e-5)
    text = prompt
    decoder.start()
    for _ in range(4):
        text = torch.cat([text, decoder.ids], 1)
        decoder.step()
        assert torch.equal(decoder.ids, model(input_ids=text).logits[:, -1:].argmax(-1))


class OnlyOnMeta(TorchDispatchMode):
    """Fails for any tensor that is made elsewhere, which a captured step would have to copy to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} made a tensor on {tensor.device}"
        return result


@torch.inference_mode()
def test_a_step_reads_no_number_and_stays_on_its_device(candidates: dict[str, torch.nn.Module], decoding: Any) -> None:
    """Else no CUDA graph could hold it. On the meta device there are no numbers to read."""
    for model in candidates.values():
        decoder = decoding.Decoder(
            model.to("meta"), torch.zeros(2, 5, dtype=torch.int64, device="meta"), 6, graph=False
        )
        with OnlyOnMeta():
            decoder.step()
        assert decoder.logits.is_meta


def test_decodings_table_judges_ours_alone(decoding: Any) -> None:
    rows = [
        {"batch": 1, "candidate": name, "path": "", "ms": ms, "tokens_per_second": 1e3 / ms, "ratio": ms / 2}
        for name, ms in ((decoding.MERGED, 2.0), (decoding.UNFUSED, 3.0), (decoding.FUSED, 2.1))
    ]
    for fused_ms, verdict in ((2.1, "1.050 | ≤ 1.05 met"), (2.2, "1.100 | ≤ 1.05 MISSED")):
        rows[-1] |= {"ms": fused_ms, "ratio": fused_ms / 2}
        results = Results("title", {}, rows)
        decoding.add_table(results)
        assert verdict in results.text() and results.text().count("≤") == 1
