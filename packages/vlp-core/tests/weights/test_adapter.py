"""The two-way mechanism, file reading and strict loading, on small made-up layouts."""

import logging
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vlp_core import weights
from vlp_core.weights import Adapter, Buffer, CheckpointError, Drop, Fuse, Rename, Tied

ADAPTER = Adapter(
    (
        Fuse(("layers.{i}.q.{p}", "layers.{i}.k.{p}", "layers.{i}.v.{p}"), "blocks.{i}.qkv.{p}"),
        Rename("layers.{i}.fc.{p}", "blocks.{i}.up.{p}"),
        Rename("cls_token", "class_token", leading=2),
        Rename("word", "embedding.word"),
        Tied("decoder", of="word"),
        Buffer("position_ids", partial(torch.arange, 5)),
        Drop("head.{rest...}"),
    )
)


def source_state() -> dict[str, torch.Tensor]:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    state = {f"layers.{i}.{n}.weight": make(4, 4) for i in range(2) for n in "qkv"}
    state |= {f"layers.{i}.{n}.bias": make(4) for i in range(2) for n in "qkv"}
    state |= {f"layers.{i}.fc.weight": make(8, 4) for i in range(2)}
    state |= {"cls_token": make(1, 1, 4), "word": make(9, 4), "position_ids": torch.arange(5)}
    return state | {"decoder": state["word"]}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_source_to_ours_and_back_is_the_identity_with_buffers_and_tied_names():
    state = source_state()
    ours = ADAPTER.to_ours(state)
    assert ours["blocks.1.qkv.weight"].shape == (12, 4)
    assert torch.equal(ours["blocks.1.qkv.bias"][4:8], state["layers.1.k.bias"])
    assert ours["class_token"].shape == (4,)
    assert not {"decoder", "position_ids"} & set(ours)
    assert_equal_states(ADAPTER.to_source(ours), state)


def test_ours_to_source_and_back_is_the_identity():
    ours = ADAPTER.to_ours(source_state())
    assert_equal_states(ADAPTER.to_ours(ADAPTER.to_source(ours)), ours)


def test_prefixes_stand_before_both_sides():
    adapter = ADAPTER.prefixed(source="text_encoder.", ours="text.")
    state = {f"text_encoder.{name}": tensor for name, tensor in source_state().items()}
    ours = adapter.to_ours(state)
    assert all(name.startswith("text.") for name in ours)
    assert_equal_states(adapter.to_source(ours), state)


def test_adapters_add_up():
    both = ADAPTER.prefixed(source="a.", ours="first.") + ADAPTER.prefixed(source="b.", ours="second.")
    state = {f"{p}{name}": tensor for p in ("a.", "b.") for name, tensor in source_state().items()}
    assert_equal_states(both.to_source(both.to_ours(state)), state)


def test_gradients_may_lack_names_and_carry_no_buffers_or_second_names():
    ours = ADAPTER.to_ours(source_state())
    gradients = {name: 2 * ours[name] for name in ("blocks.0.qkv.weight", "embedding.word")}
    source = ADAPTER.to_source(gradients, gradients=True)
    assert set(source) == {"layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight", "word"}
    assert torch.equal(source["layers.0.v.weight"], 2 * source_state()["layers.0.v.weight"])
    assert_equal_states(ADAPTER.to_ours(source, gradients=True), gradients)


def test_gradient_of_a_buffer_is_refused():
    with pytest.raises(CheckpointError, match="position_ids is a buffer"):
        ADAPTER.to_ours({"position_ids": torch.zeros(5)}, gradients=True)


def test_translation_is_linear():
    a = {name: tensor.double() for name, tensor in source_state().items() if name != "position_ids"}
    b = {name: tensor.flip(0) for name, tensor in a.items()}
    mixed = ADAPTER.to_ours({name: 3 * a[name] - 2 * b[name] for name in a})
    ours_a, ours_b = ADAPTER.to_ours(a), ADAPTER.to_ours(b)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 3 * ours_a[name] - 2 * ours_b[name])


def test_second_name_alone_stands_for_the_first():
    state = source_state()
    alone = {name: tensor for name, tensor in state.items() if name != "word"}
    assert torch.equal(ADAPTER.to_ours(alone)["embedding.word"], state["word"])


def test_tied_tensors_that_differ_are_refused():
    with pytest.raises(CheckpointError, match="decoder and word must be one tensor"):
        ADAPTER.to_ours(source_state() | {"decoder": torch.zeros(9, 4)})


def test_dropped_names_are_ignored():
    assert "head.a.b" not in ADAPTER.to_ours(source_state() | {"head.a.b": torch.zeros(1)})


def test_unknown_names_are_listed_by_group():
    state = source_state() | {
        "extra.layer.a": torch.zeros(1),
        "extra.layer.b": torch.zeros(1),
        "x": torch.zeros(1),
    }
    with pytest.raises(
        CheckpointError, match=r"3 tensors.*extra\.layer \(2, such as extra\.layer\.a\), x \(1\)"
    ):
        ADAPTER.to_ours(state)
    with pytest.raises(CheckpointError, match=r"1 of our tensors.*nowhere"):
        ADAPTER.to_source({"nowhere": torch.zeros(1)})


def test_missing_part_of_a_fused_tensor_is_named():
    state = source_state()
    del state["layers.1.k.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.k\.bias missing: our blocks\.1\.qkv\.bias"):
        ADAPTER.to_ours(state)


def test_parts_of_different_shape_are_named():
    state = source_state() | {"layers.1.k.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.q\.bias \[4\], layers\.1\.k\.bias \[5\]"):
        ADAPTER.to_ours(state)


def test_fused_tensor_that_cannot_be_split_is_named():
    with pytest.raises(CheckpointError, match=r"blocks\.0\.qkv\.bias has 10 rows"):
        ADAPTER.to_source({"blocks.0.qkv.bias": torch.zeros(10)})


def test_leading_axes_are_checked():
    with pytest.raises(CheckpointError, match=r"cls_token has shape \[2, 1, 4\]"):
        ADAPTER.to_ours({"cls_token": torch.zeros(2, 1, 4)})


def test_two_names_for_one_of_ours_are_refused():
    adapter = Adapter((Rename("a.{p}", "x.{p}"), Rename("b.{p}", "x.{p}")))
    with pytest.raises(CheckpointError, match=r"b\.w and a\.w both stand for our x\.w"):
        adapter.to_ours({"a.w": torch.zeros(1), "b.w": torch.zeros(1)})


@pytest.mark.parametrize(
    "row",
    [
        lambda: Rename("a.{i}", "b.{j}"),
        lambda: Rename("a.{i}", "b"),
        lambda: Fuse(("a.{i}", "b"), "c.{i}"),
        lambda: Tied("a.{i}", of="b"),
    ],
    ids=["other-name", "lost", "part", "tied"],
)
def test_rows_that_cannot_be_undone_are_refused(row):
    with pytest.raises(ValueError, match="reversible"):
        row()


# ---- files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"state_dict": {f"module.{name}": t for name, t in s.items()}},
    ],
    ids=["plain", "model", "state_dict", "module"],
)
def test_read_unwraps_and_strips_module(tmp_path, wrap):
    torch.save(wrap(source_state()), tmp_path / "file.pth")
    assert_equal_states(weights.read(tmp_path / "file.pth"), source_state())


def test_module_prefix_of_some_names_only_is_kept(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "file.pth")
    assert set(weights.read(tmp_path / "file.pth")) == {"module.a", "b"}


def test_read_checkpoint_returns_what_stands_beside_the_tensors(tmp_path):
    torch.save({"model": source_state(), "config": {"image_res": 384}}, tmp_path / "file.th")
    assert weights.read_checkpoint(tmp_path / "file.th").extra == {"config": {"image_res": 384}}


@pytest.mark.parametrize("suffix", ["safetensors", "th"])
def test_written_file_with_tied_tensors_reads_back(tmp_path, suffix):
    file = tmp_path / f"file.{suffix}"
    weights.write(file, source_state())
    assert_equal_states(weights.read(file), source_state())


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_file_that_needs_pickle_is_refused_with_the_way_out(tmp_path):
    torch.save({"model": source_state(), "config": Payload()}, tmp_path / "file.pth")
    with pytest.raises(
        CheckpointError, match=r"file\.pth cannot be read as plain tensors.*exec.*torch\.save\(\{"
    ):
        weights.read(tmp_path / "file.pth")


def test_bare_pickle_is_refused(tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError, match=r"file\.pkl"):
        weights.read(tmp_path / "file.pkl")


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no tensors", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"])
def test_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        weights.read(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth not found"):
        weights.read(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds nothing"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "epoch, weights are no tensors"),
        ([torch.ones(1)], "a list"),
    ],
    ids=["empty", "other-key", "list"],
)
def test_file_without_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        weights.read(tmp_path / "file.pth")


# ---- loading


class Table(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(rows, 2))

    def position_tables(self):
        return {"positions": lambda table, shape: table.mean(0).expand(shape)}


def model(rows: int = 3) -> nn.Module:
    model = nn.Module()
    model.body = nn.Linear(2, 4)
    model.head = nn.Linear(4, 1)
    model.table = Table(rows)
    return model


NAMES = Adapter(
    (Rename("trunk.{p}", "body.{p}"), Rename("fc.{p}", "head.{p}"), Rename("pos", "table.positions"))
)


def trained() -> dict[str, torch.Tensor]:
    source = NAMES.to_source(model().state_dict())
    return {name: torch.full_like(tensor, 7.0) for name, tensor in source.items()}


def test_load_fills_every_parameter_from_a_file(tmp_path):
    save_file(trained(), tmp_path / "file.safetensors")
    mine = model()
    report = weights.load(mine, tmp_path / "file.safetensors", NAMES)
    assert all(bool((p == 7).all()) for p in mine.parameters())
    assert set(report.loaded) == set(mine.state_dict())
    assert report.missing == report.unexpected == report.resized == ()


def test_load_lists_missing_and_unexpected_and_leaves_the_model_alone():
    state = trained() | {"other.a": torch.zeros(1)}
    del state["fc.weight"], state["fc.bias"]
    mine = model()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"2 missing: head\.weight \(1\), head\.bias \(1\); 1 unexpected: other\.a \(1\)",
    ):
        weights.load(mine, state, NAMES)
    assert_equal_states(mine.state_dict(), before)


def test_allowed_groups_may_be_missing_or_left_over():
    state = trained() | {"other.a": torch.zeros(1)}
    del state["fc.weight"], state["fc.bias"]
    report = weights.load(model(), state, NAMES, allow_missing=["head"], allow_unexpected=["oth*"])
    assert report.missing == ("head.weight", "head.bias")
    assert report.unexpected == ("other.a",)


def test_a_group_is_whole_components():
    state = trained()
    del state["fc.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: head\.weight"):
        weights.load(model(), state, NAMES, allow_missing=["hea"])


def test_load_refuses_a_checkpoint_of_which_nothing_fits():
    with pytest.raises(
        CheckpointError,
        match=r"nothing in the state dict belongs to this Module: it holds visual\.a \(1\).*trunk\.weight",
    ):
        weights.load(
            model(), {"visual.a": torch.zeros(1)}, NAMES, allow_missing=["*"], allow_unexpected=["*"]
        )


def test_refusal_names_what_was_expected_also_for_a_model_the_adapter_covers_in_part():
    body = Adapter((Rename("trunk.{p}", "body.{p}"),))
    assert body.knows("body.weight") and not body.knows("head.weight")
    with pytest.raises(CheckpointError, match=r"where trunk\.weight \(1\), trunk\.bias \(1\) was expected"):
        weights.load(model(), {"visual.a": torch.zeros(1)}, body)


def test_load_names_tensors_of_a_wrong_shape():
    with pytest.raises(
        CheckpointError, match=r"body\.bias does not fit: it has shape \[5\], the model needs \[4\]"
    ):
        weights.load(model(), trained() | {"trunk.bias": torch.zeros(5)}, NAMES)


def test_a_long_list_of_wrong_shapes_is_cut():
    mine = nn.ModuleList(nn.Linear(1, 2, bias=False) for _ in range(13))
    with pytest.raises(CheckpointError, match=r"9\.weight does not fit: [^;]*; 3 more do not fit$"):
        weights.load(mine, {name: torch.zeros(5, 1) for name in mine.state_dict()})


def test_load_resizes_tables_and_says_so_once(caplog):
    mine = model(rows=6)
    with caplog.at_level(logging.INFO, logger="vlp_core.weights"):
        report = weights.load(mine, trained(), NAMES)
    assert report.resized == ("table.positions",)
    assert mine.table.positions.shape == (6, 2)
    assert bool((mine.table.positions == 7).all())
    assert [record.message for record in caplog.records] == [
        "the state dict: resized 1 position table from 3 to 6 rows"
    ]


def test_load_without_resizing_refuses_other_tables():
    with pytest.raises(
        CheckpointError,
        match=r"table\.positions does not fit: it has shape \[3, 2\], the model needs \[6, 2\]",
    ):
        weights.load(model(rows=6), trained(), NAMES, resize=False)


def test_load_without_adapter_takes_our_own_names():
    state = {name: torch.ones_like(tensor) for name, tensor in model().state_dict().items()}
    mine = model()
    weights.load(mine, state)
    assert_equal_states(mine.state_dict(), state)
