"""The benchmark: every case runs and is right, ratios and floors are judged as documented."""

import argparse
import json
import math

import pytest
import torch
import vlp_ops
from vlp_ops import bench, bench_cases

TINY = {
    "DEFORMABLE": [("tiny", [(9, 8), (8, 9)], None, 1), ("tiny decoder", [(9, 8)], 16, 2)],
    "BAGS": [("tiny", 32, 4, 64, 8)],
    "KEYS": [("tiny", 64, 2, 8, 4, 8)],
    "LOSS_SIZES": [(64, 16)],
    "TOKENS": (8, 9, 16, 3),
}
OPERATORS = list(bench_cases.CASES)
NAMES = ["ours", "gather", "x[rows, ids]"]


@pytest.fixture
def tiny(monkeypatch):
    """Every case in sizes for tests; those of the GPU on the CPU."""
    for name, sizes in TINY.items():
        monkeypatch.setattr(bench_cases, name, {"cpu": sizes, "cuda": sizes})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_floors_name_cases_and_peers_that_exist(device, monkeypatch):
    """A renamed case would otherwise never be judged again."""
    for name in ("deformable_inputs",):
        monkeypatch.setattr(bench_cases, name, lambda *_, **__: (torch.empty(1, 1, 1, 1),) * 4)
    monkeypatch.setattr(bench_cases, "compiled", lambda function: function)
    known = {}
    for op, make in bench_cases.CASES.items():
        notes = {}
        for case in make(device, torch.float32, notes):
            phase = "" if device == "cpu" else f" {case.phase}"
            peers = {*case.functions, *notes, "ceiling"}
            mean = f"{op}/geometric mean/{case.phase}"
            known |= {case.key: peers, f"{op}/{case.name}/peak memory{phase}": peers, mean: peers}
    for key, peers in bench.floors(device).items():
        assert set(peers) <= known[key], f"{key}: {set(peers) - known[key]}"


def broken(part: str):
    """take_tokens with a wrong output, or with a right one and a wrong gradient; on large problems only."""
    right = vlp_ops.take_tokens

    def function(x, ids):
        out = right(x, ids)
        if len(x) < 64:
            return out
        if part == "output":
            return out + 0.01 * (torch.arange(out.numel()) == 7).view_as(out)
        return out.detach() + 1.001 * (out - out.detach())

    return function


@pytest.mark.parametrize(("part", "phase"), [("output", "forward"), ("gradient", "backward")])
@pytest.mark.parametrize("name", ["ours", "gather"])
def test_a_wrong_result_fails_the_run(part, phase, name, capsys, monkeypatch, tmp_path):
    """Of ours and of a peer, in any output or gradient, also where only the timed problem shows it."""
    target = (bench_cases.vlp_ops, "take_tokens") if name == "ours" else (bench_cases, "repeated_gather")
    monkeypatch.setattr(*target, broken(part))
    monkeypatch.setattr(bench, "floors", lambda device: {})
    file = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--op", "take_tokens", "--repeat", "1", "--json", str(file)]
    assert bench.main(arguments) == 1
    assert f"keep 49/{phase}: {name}, timed problem: error " in capsys.readouterr().out
    assert json.loads(file.read_text())["wrong"]


def test_errors():
    exact = torch.tensor([1.0, -4.0, 2.0, 0.0] * 500, dtype=torch.float64)
    found = exact.clone().float()
    assert bench.relative_error(found, exact) == 0
    found[3] = 0.4
    assert bench.relative_error(found, exact) == pytest.approx(0.1)
    # Two numbers of 2,000 may differ.
    found[5] = torch.nan
    assert bench.relative_error(found, exact) == torch.inf
    assert bench.relative_error(found, exact, undecided=1e-3) == 0
    found[6] = 0.0
    assert bench.relative_error(found, exact, undecided=1e-3) == pytest.approx(0.1)
    assert bench.relative_error(found[1:], exact) == torch.inf
    assert bench.worst_error([exact, found], [exact, exact]) == torch.inf


def test_below():
    targets = {"a/b/forward": {"x": 2.0, "y": 3.0}, "not run/at/all": {"x": 9.0}}
    assert bench.below({"a/b/forward": {"x": 2.0, "y": 3.5}}, targets) == []
    assert bench.below({"a/b/forward": {"x": 1.99, "y": 3.5}}, targets) == ["a/b/forward: 1.99x x, floor 2x"]


def test_means():
    results = [
        bench.Result("a/one/forward", {"ours": 1.0, "x": 2.0, "y": 5.0}),
        bench.Result("a/two/forward", {"ours": 1.0, "x": 8.0}),
        bench.Result("a/two/backward", {"ours": 2.0, "x": 6.0}),
    ]
    found = bench.means(results)
    assert found["a/geometric mean/forward"] == pytest.approx({"x": 4.0, "y": 5.0})
    assert found["a/geometric mean/backward"] == pytest.approx({"x": 3.0})


def test_measure_takes_the_fastest(monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", -1.0)
    ticks = iter([0.0, 5.0, 5.0, 6.0, 6.0, 9.0, 9.0, 9.5])
    assert bench.measure({"ours": int, "peer": int}, 2, lambda: next(ticks)) == {"ours": 3.0, "peer": 0.5}


def test_short_calls_get_more_turns_and_are_warmed(monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.05)
    calls = []
    bench.measure({"ours": lambda: calls.append(1)}, 2, bench.time.perf_counter)
    assert len(calls) > 100
    calls.clear()
    bench.measure({"ours": lambda: calls.append(1)}, 1, bench.time.perf_counter)
    # Before the turns, and the turn: nothing is known of its time yet.
    assert len(calls) == 2


def test_sets_of_inputs():
    """Twice a cache of 60 MB, beyond the set in use."""
    assert bench.sets_of_inputs(0.007, 60_000_000) == 19
    assert bench.sets_of_inputs(1.0, 60_000_000) == 2
    assert bench.sets_of_inputs(1e-5, 60_000_000) == 64


@pytest.mark.parametrize("op", OPERATORS)
def test_every_implementation_is_right(op, tiny):
    """Also those of the GPU run: what they compare would mean nothing otherwise."""
    torch.manual_seed(0)
    cases = list(bench_cases.CASES[op]("cpu", torch.float64, {}))
    assert cases
    for case in cases:
        errors = bench.errors_of(case, list(case.functions))
        assert len(errors) >= 2 and max(errors.values()) < 1e-9, (case.key, errors)
    # The dtype of the GPU. Rounded scores may choose other slots of a memory.
    for case in bench_cases.CASES[op]("cpu", torch.bfloat16, {}):
        error = bench.errors_of(case, ["ours"])["ours"]
        assert error < (math.inf if op == "product_key_lookup" else 0.1), (case.key, error)


def test_small_tables_are_drawn_as_often_as_zipf_says():
    torch.manual_seed(0)
    counts = bench_cases.zipf(8, (1000, 20)).flatten().bincount(minlength=8).double()
    wanted = torch.arange(1, 9, dtype=torch.float64) ** -1.1
    torch.testing.assert_close(counts / counts.sum(), wanted / wanted.sum(), rtol=0.1, atol=0.01)


def test_missing_and_broken_peers_are_said(tiny, capsys, monkeypatch):
    def broken(*args):
        raise ValueError("no such device\nlong story")

    notes = {}
    found = bench_cases.optional(
        notes, {"a": lambda: __import__("vlp_ops_no_such"), "b": broken, "c": lambda: broken}
    )
    assert notes == {"a": "not installed", "b": "cannot be used: no such device"}
    monkeypatch.setitem(bench_cases.LOSSES["clip_loss"], "c", found["c"])
    monkeypatch.setattr(bench_cases, "open_clip_loss", lambda: __import__("vlp_ops_no_such"))
    monkeypatch.setattr(bench, "memory_results", lambda ops, rows: [])
    arguments = ["--device", "cpu", "--op", "clip_loss", "--repeat", "1", "--losses", "24"]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "open_clip: not installed: not measured" in printed
    assert "c, clip_loss/24 x 512/forward+backward: failed: no such device: not measured" in printed


def test_one_operator_end_to_end(tmp_path, capsys, monkeypatch):
    file = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--op", "take_tokens", "--repeat", "1", "--json", str(file)]
    monkeypatch.setattr(bench, "floors", lambda device: {})
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "take_tokens/64 x 196 x 768 keep 49/forward: ours" in printed and "% of copy" in printed
    record = json.loads(file.read_text())
    assert record["cases"]["take_tokens/64 x 196 x 768 keep 49/forward"]["errors"] == dict.fromkeys(NAMES, 0)
    key = "take_tokens/64 x 196 x 768 keep 49/forward"
    monkeypatch.setattr(bench, "floors", lambda device: {key: {"gather": 1e9}})
    assert bench.main(arguments) == 1
    assert "BELOW ITS FLOOR take_tokens" in capsys.readouterr().out


def test_gpu_run_on_the_cpu(tiny, capsys, monkeypatch):
    """The whole GPU path with stand-ins for what only a GPU has: clocks, graphs, memory counters, compiled
    code."""
    times = {"fast": 20e-6}
    monkeypatch.setattr(bench, "do_bench", lambda run: (run(), times["fast"])[1])
    monkeypatch.setattr(bench, "graph_time", lambda runs, stream: sum(run() is None for run in runs) + 1e-6)
    monkeypatch.setattr(bench, "peak_on_gpu", lambda run: 1 << 20)
    monkeypatch.setattr(bench_cases, "compiled", lambda function: function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: argparse.Namespace(L2_cache_size=100))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for op in OPERATORS:
        # The arguments are made on the device the cases are given.
        monkeypatch.setitem(
            bench_cases.CASES,
            op,
            lambda device, dtype, notes, make=bench_cases.CASES[op], **more: make(
                "cpu", dtype, notes, **more
            ),
        )
    options = argparse.Namespace(device="cuda", threads=1, repeat=1)
    limits = {"copy": 4300.0, "gemm": 790e3}
    for op in OPERATORS:
        notes = {}
        for case in bench_cases.CASES[op]("cuda", torch.bfloat16, notes):
            result = bench.run_case(case, options, limits, notes)
            assert result.seconds["ours"] == 20e-6 and result.graph_seconds.keys() == result.seconds.keys()
            assert set(result.peak_bytes.values()) == {1 << 20} and result.of_ceiling > 0
            bench.show(result, "cuda")
    printed = capsys.readouterr().out
    assert "in a CUDA graph: ours 1.00 us; " in printed and "peak memory: ours 1 MB" in printed


@pytest.mark.gpu
def test_gpu_run(tiny, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(bench, "floors", lambda device: {})
    file = tmp_path / "result.json"
    assert bench.main(["--device", "cuda", "--json", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert {key.split("/")[0] for key in cases} == set(OPERATORS)
    assert all(case["errors"]["ours"] < 0.1 and case["graph_seconds"]["ours"] > 0 for case in cases.values())


def test_memory_of_losses_is_measured(monkeypatch):
    monkeypatch.setattr(bench, "loss_functions", lambda op, device, notes: bench_cases.LOSSES[op])
    ((key, peaks),) = bench.memory_results(["clip_loss"], 1024)
    assert key == "clip_loss/1024 x 512/peak memory"
    # Two matrices of 4 MB at least, against tiles.
    assert peaks["one product"] > 8e6


def test_device_must_be_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err
