"""The benchmark: every case runs and is right, ratios and floors are judged as documented."""

import json

import pytest
import torch
from vlp_ops import bench


def test_floors_name_cases_that_exist(monkeypatch):
    """A renamed case would otherwise never be judged again."""
    monkeypatch.setattr(bench, "both_passes", lambda function, leaves: None)
    keys = {case.key for case in bench.loss_cases(8192)} | {
        f"{op}/8192 x 512/peak memory" for op in bench.LOSSES
    }
    keys |= {case.key for case in bench.token_cases()}
    text = json.dumps(bench.floors())
    for key in bench.floors():
        if key.split("/")[0] in ("ms_deform_attn", "embedding_bag"):
            continue
        assert key in keys, f"{key} of {text}"


def test_below():
    targets = {"a/b/forward": {"x": 2.0, "y": 3.0}, "not run/at/all": {"x": 9.0}}
    assert bench.below({"a/b/forward": {"x": 2.0, "y": 3.5}}, targets) == []
    assert bench.below({"a/b/forward": {"x": 1.99, "y": 3.5}}, targets) == ["a/b/forward: 1.99x x, floor 2x"]


def test_measure_takes_the_fastest():
    ticks = iter([0.0, 5.0, 5.0, 6.0, 6.0, 9.0, 9.0, 9.5])
    assert bench.measure({"ours": int, "peer": int}, 2, lambda: next(ticks)) == {"ours": 3.0, "peer": 0.5}


def test_one_operator_end_to_end(tmp_path, capsys, monkeypatch):
    file = tmp_path / "result.json"
    arguments = ["--op", "take_tokens", "--repeat", "1", "--json", str(file)]
    monkeypatch.setattr(bench, "floors", dict)
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "take_tokens/64 x 196 x 768 keep 49/forward: ours" in printed and "% of copy" in printed
    record = json.loads(file.read_text())
    (errors,) = (case["errors"] for key, case in record["cases"].items() if key.startswith("take"))
    assert errors == {"ours": 0.0, "gather": 0.0}
    monkeypatch.setattr(
        bench, "floors", lambda: {"take_tokens/64 x 196 x 768 keep 49/forward": {"gather": 1e9}}
    )
    assert bench.main(arguments) == 1
    assert "BELOW ITS FLOOR take_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_losses_are_checked_and_their_memory_is_measured(op):
    for case in bench.loss_cases(64):
        if case.op == op:
            found, exact = case.check()
            assert set(found) == set(case.runs)
            assert bench.relative_error(found["ours"], exact) < 1e-5
    ((key, peaks),) = bench.memory_results([op], 1024)
    assert key == f"{op}/1024 x 512/peak memory"
    # Two matrices of 4 MB at least, against tiles.
    assert peaks["open_clip's formula"] > 8e6


def test_deformable_peer_is_the_operator():
    tensors = bench.deformable_inputs([(5, 6), (2, 3)], None)
    torch.testing.assert_close(
        bench.grid_sample_attention(tensors[0], [(5, 6), (2, 3)], *tensors[1:]),
        bench.vlp_ops.ms_deform_attn(tensors[0], [(5, 6), (2, 3)], *tensors[1:]),
        rtol=1e-4,
        atol=1e-5,
    )
