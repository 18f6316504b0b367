"""Official ViCHA layouts with teacher and queue: names and shapes at full size, parameter groups, conversion
from pre-training to the tasks."""

import json
import re
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from vlp_core import models
from vlp_core.heads import MaskedLanguageHead
from vlp_core.models.vicha import checkpoints as vicha
from vlp_core.models.vicha.model import NOT_TAUGHT
from vlp_core.momentum import NO_ID, FeatureQueue, teacher_of
from vlp_core.text.bert import Bert
from vlp_core.vision.positions import resize_position_table
from vlp_core.weights import Checkpoint, CheckpointError
from vlp_core.weights.bert import load_published_layers

NO_TEACHER = ("nlvr_domain",)
IDLE = ("temp", "text_proj.weight", "text_proj.bias")
"""Stored in the domain stage of NLVR2, used by nothing there, and absent from our model."""


def beside(model: nn.Module, stage: str, *, queue_size: int = 8, width: int = 6):
    """The teacher of a model, None where its stage has none, and its queue, likewise."""
    teacher = None if stage in NO_TEACHER else teacher_of(model, without=NOT_TAUGHT)
    if stage not in ("pretrain", "retrieval"):
        return teacher, None
    return teacher, FeatureQueue(queue_size, width, identities=stage == "retrieval")


def official(model: nn.Module, teacher: nn.Module | None, queue: FeatureQueue | None) -> dict[str, Tensor]:
    return vicha.FILES.to_source(model, teacher=teacher, queue=queue)


def is_key_list(case) -> bool:
    return case.path.is_file() and case.path.stem == "official_keys"


@pytest.mark.golden("vicha", is_key_list)
def test_released_layouts_load_at_full_size_and_are_written_back(case):
    for name, shapes in json.loads(case.path.read_text()).items():
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        arguments = vicha.infer_arguments(Checkpoint(state, {}))
        found = vicha.FILES.stage(state)
        with torch.device("meta"):
            model = models.create("vicha", found, **arguments)
            size, width = state["image_queue"].shape[::-1] if "image_queue" in state else (1, 1)
            teacher, queue = beside(model, found, queue_size=size, width=width)
        result = vicha.FILES.load(model, state, stage=found, teacher=teacher, queue=queue)
        assert result.missing == result.unexpected == result.resized == (), name
        idle = IDLE if found == "nlvr_domain" else ()
        written = {key: list(x.shape) for key, x in official(model, teacher, queue).items()}
        assert written == {key: shape for key, shape in shapes.items() if key not in idle}, name


def numbered(module: nn.Module, seed: int) -> None:
    """Values of its own for every tensor of a module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)


def full_depth(keys: Iterable[str]) -> dict:
    """Arguments of a narrow pre-training model with the layers that official names have."""
    return {
        "vision": {
            "kind": "vit",
            "image_size": 32,
            "patch": 8,
            "width": 8,
            "depth": vicha.count(keys, r"visual_encoder\.blocks\.(\d+)\."),
            "heads": 2,
            "local_depth": 0,
        },
        "text": {
            "vocabulary": 9,
            "width": 8,
            "layers": 12,
            "heads": 2,
            "hidden": 8,
            "positions": 9,
            "fusion_layer": 6,
        },
        "concepts": {"layers": vicha.count(keys, r"kw_encoder\.encoder\.layer\.(\d+)\.")},
        "masked_image": {"width": 16, "heads": 2},
        "embed_width": 6,
        "heads": ["contrast", "match", "masked_language", "hidden"],
    }


def listed(names) -> set[str]:
    """Unused names as the load maps list them: after the reference's renaming, without numbers of positions
    where it counts those."""
    return {name.replace(".bert.", ".") for name in names if not name.endswith("position_ids")}


def doubled(name: str) -> list[str]:
    """The reference doubles the fusion layers of a teacher too before it throws them away."""
    layer = re.fullmatch(r"(text_encoder_m\.encoder\.layer\.)(\d+)(\..+)", name)
    if layer is None or int(layer[2]) < 6:
        return [name]
    first = 2 * int(layer[2]) - 6
    return [f"{layer[1]}{number}{layer[3]}" for number in (first, first + 1)]


STAGES = {"ve": "entailment", "nlvr_ta_pretrain": "nlvr_domain"}
"""Names of the load maps that differ from ours."""


@pytest.mark.golden("vicha", lambda case: case.path.is_file() and case.path.stem == "load_maps")
def test_each_task_takes_each_tensor_from_where_the_reference_does(case):
    maps = json.loads(case.path.read_text())
    moves = [name for name in maps if "->" in name and f"{name} (unused source keys)" in maps]
    assert moves
    for name in moves:
        expected, unused = maps[name], maps[f"{name} (unused source keys)"]
        first, wanted = (STAGES.get(stage, stage) for stage in name.split("->"))
        pretrained = full_depth(expected)
        begun = models.create("vicha", first, **models.derive("vicha", first, pretrained))
        numbered(begun, 0)
        teacher, queue = beside(begun, first)
        if teacher is not None:
            numbered(teacher, 1)
        if queue is not None:
            queue.pointer.fill_(4)
        source = official(begun, teacher, queue)

        vision = {**pretrained["vision"], "image_size": 52}
        arguments = models.derive("vicha", wanted, {**pretrained, "vision": vision})
        model = models.create("vicha", wanted, **arguments)
        numbered(model, 2)
        own_teacher, own_queue = beside(model, wanted)
        before = {key: x.clone() for key, x in official(model, own_teacher, own_queue).items()}
        # Where nothing of the checkpoint reaches the teacher, the reference leaves it as it was made.
        reached = any(key.split(".")[0].endswith("_m") and origin for key, origin in expected.items())
        result = vicha.FILES.start(
            model, source, stage=wanted, teacher=own_teacher if reached else None, queue=own_queue
        )
        after = official(model, own_teacher, own_queue)

        idle = IDLE if wanted == "nlvr_domain" else ()
        assert after.keys() == expected.keys() - set(idle), name
        for key, x in after.items():
            origin = expected[key]
            if origin is None:
                assert torch.equal(x, before[key]), (name, key)
            elif key.endswith("pos_embed"):
                table = resize_position_table(source[origin][0], 6)
                assert torch.equal(x[0], table), (name, key)
            else:
                assert torch.equal(x, source[origin]), (name, key)
        # Our domain stage lacks what is idle in it: as a start it does not hold it, as a target it does not
        # take it.
        spare = set(IDLE) if wanted == "nlvr_domain" else set()
        absent = set(IDLE) if first == "nlvr_domain" else set()
        found = listed(result.unexpected)
        if wanted == "nlvr_domain":
            found = {key for unused_name in found for key in doubled(unused_name)}
        assert found == (listed(unused) | spare) - absent, name


@pytest.mark.golden("vicha", lambda case: case.path.is_file() and case.path.stem == "load_maps")
def test_shared_projections_of_nlvr_are_those_of_the_reference(case):
    maps = json.loads(case.path.read_text())
    arguments = models.derive("vicha", "nlvr", full_depth(maps["nlvr_ta_pretrain->nlvr"]))
    model = models.create("vicha", "nlvr", **arguments)
    written = vicha.vicha_adapter(model).to_source(model.state_dict())
    found = {
        frozenset((first, second))
        for first in written
        for second in written
        if first < second and written[first] is written[second]
    }
    assert found == {frozenset(pair) for pair in maps["nlvr tied tensors"]}


# Small models
# ------------------------------------------------------------------------------------------------------------

TINY = {
    "vision": {
        "kind": "vit",
        "image_size": 64,
        "patch": 16,
        "width": 64,
        "depth": 3,
        "heads": 1,
        "local_depth": 0,
    },
    "text": {
        "kind": "bert",
        "vocabulary": 20,
        "width": 64,
        "layers": 4,
        "heads": 1,
        "hidden": 16,
        "positions": 60,
        "fusion_layer": 2,
    },
    "concepts": {"layers": 1},
    "embed_width": 6,
    "heads": ["contrast", "match", "masked_language", "hidden"],
    "levels": 2,
    "masked_image": {"width": 32, "depth": 1, "heads": 16},
}
TASKS = ("pretrain", "retrieval", "nlvr", "nlvr_domain", "entailment", "vqa")


def tiny(stage: str = "pretrain", seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = models.create("vicha", stage, **models.derive("vicha", stage, {**TINY, **changes}))
    numbered(model, seed)
    teacher, queue = beside(model, stage)
    if teacher is not None:
        numbered(teacher, seed + 100)
    return model, teacher, queue


def assert_same(first: nn.Module | None, second: nn.Module | None) -> None:
    if first is not None and second is not None:
        state = second.state_dict()
        assert all(torch.equal(x, state[key]) for key, x in first.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("stage", TASKS)
def test_files_are_written_and_read_back_with_teacher_and_queue(stage, suffix, tmp_path):
    model, teacher, queue = tiny(stage)
    vicha.FILES.write(tmp_path / f"a.{suffix}", model, teacher=teacher, queue=queue)
    others = tiny(stage, 1)
    result = vicha.FILES.load(
        others[0], tmp_path / f"a.{suffix}", stage=stage, teacher=others[1], queue=others[2]
    )
    assert result.missing == result.unexpected == ()
    for mine, theirs in zip((model, teacher, queue), others, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("stage", TASKS)
def test_official_files_open_without_being_told_what_they_are(stage, tmp_path):
    model, teacher, queue = tiny(stage)
    state = official(model, teacher, queue)
    torch.save({"model": state, "config": {"image_res": 70, "mask_ratio": 0.5}}, tmp_path / "a.pth")
    if stage == "pretrain":  # patches to predict must be whole ones
        torch.save({"model": state, "config": {"image_res": 64, "mask_ratio": 0.5}}, tmp_path / "a.pth")
    found = models.describe(tmp_path / "a.pth")
    assert (found.family, found.stage) == ("vicha", stage)
    assert found.view == {"kind": "squash", "size": 64 if stage == "pretrain" else 70}
    assert found.reading == {"tokenizer": {"kind": "wordpiece", "files": []}, "vocabulary": 20}
    assert found.settings == {"concepts": {"max_tokens": 55, "pad": "max", "separator": False}}
    loaded = models.load(tmp_path / "a.pth")
    assert models.Description(*loaded[1:]) == found
    assert not loaded.model.training
    assert_same(model, loaded.model)
    if stage == "pretrain":
        assert loaded.model.masked_image.ratio == 0.5


def test_image_sizes_that_do_not_fit_the_positions_are_not_believed():
    model, teacher, queue = tiny("entailment")
    state = official(model, teacher, queue)
    for config, size in (({}, 64), ({"image_res": 79}, 79), ({"image_res": 384}, 64)):
        assert vicha.infer_arguments(Checkpoint(state, {"config": config}))["vision"]["image_size"] == size


@pytest.mark.parametrize("by", ["decoder", "fusion", "both"])
def test_kinds_of_masked_images_are_told_apart(by):
    masked = {"by": by} if by == "fusion" else {"width": 64, "depth": 1, "heads": 16, "by": by}
    model, teacher, queue = tiny(masked_image=masked)
    found = vicha.infer_arguments(Checkpoint(official(model, teacher, queue), {}))
    assert found["masked_image"] == {**masked, "ratio": 0.75}


def albef(stage: str, seed: int = 0):
    """A model without the three additions of ViCHA."""
    return tiny(stage, seed, concepts=None, masked_image=None, heads=["contrast", "match", "masked_language"])


@pytest.mark.parametrize("stage", TASKS)
def test_files_of_albef_open_as_models_without_concepts(stage, tmp_path):
    model, teacher, queue = albef(stage)
    vicha.FILES.write(tmp_path / "a.pth", model, teacher=teacher, queue=queue)
    loaded = models.load(tmp_path / "a.pth")
    assert_same(model, loaded.model)
    assert "concepts" not in loaded.settings
    if stage != "pretrain":
        vicha.FILES.write(tmp_path / "b.pth", *albef("pretrain")[:1])
        models.start_from(albef(stage, 1)[0], tmp_path / "b.pth", family="vicha", stage=stage)


def test_a_model_with_concepts_does_not_start_from_a_file_without():
    plain, teacher, queue = albef("pretrain")
    with pytest.raises(CheckpointError, match=r"missing: vision\.concepts"):
        vicha.FILES.start(tiny("retrieval")[0], official(plain, teacher, queue), stage="retrieval")
    model, teacher, queue = tiny()
    with pytest.raises(CheckpointError, match=r"unknown tensors: kw_encoder"):
        vicha.FILES.start(albef("retrieval")[0], official(model, teacher, queue), stage="retrieval")


def test_retrieval_takes_the_queue_and_knows_no_identity_in_it():
    pretrained, teacher, queue = tiny()
    queue.put(torch.ones(3, 6), torch.ones(3, 6))
    model, own_teacher, own_queue = tiny("retrieval", 1)
    own_queue.ids.fill_(NO_ID)
    result = vicha.FILES.start(
        model,
        official(pretrained, teacher, queue),
        stage="retrieval",
        teacher=own_teacher,
        queue=own_queue,
    )
    assert own_queue.pointer == 3
    assert torch.equal(own_queue.image, queue.image)
    assert (own_queue.ids == NO_ID).all()
    assert result.missing == ("queue.ids",)
    assert torch.equal(model.temperature, pretrained.temperature)
    with pytest.raises(CheckpointError, match=r"holds 8 x 6 numbers, that of this run 5 x 6"):
        vicha.FILES.start(
            model,
            official(pretrained, teacher, queue),
            stage="retrieval",
            queue=FeatureQueue(5, 6, identities=True),
        )


def test_a_teacher_that_the_file_lacks_is_copied_from_the_started_model():
    domain = tiny("nlvr_domain")[0]
    model, teacher, _ = tiny("nlvr", 1)
    vicha.FILES.start(model, official(domain, None, None), stage="nlvr", teacher=teacher)
    assert_same(teacher, model)
    assert torch.equal(teacher.text.layers[0].expand.weight, domain.text.layers[0].expand.weight)


def test_a_fresh_head_is_the_same_for_model_and_teacher():
    pretrained = official(*tiny())
    torch.manual_seed(3)
    model = models.create("vicha", "entailment", **models.derive("vicha", "entailment", TINY))
    teacher = teacher_of(model)
    result = vicha.FILES.start(model, pretrained, stage="entailment", teacher=teacher)
    fresh = [key for key in model.state_dict() if key.startswith("cls_head.")]
    assert set(result.missing) == {*fresh, *(f"teacher.{key}" for key in fresh)}
    assert_same(teacher.cls_head, model.cls_head)
    assert not torch.equal(teacher.vision.encoder.patch.weight, model.vision.encoder.patch.weight)


def test_what_a_file_lacks_is_named():
    model = tiny("entailment")[0]
    state = official(model, None, None)
    with pytest.raises(CheckpointError, match="holds no teacher; leave teacher out, or use start"):
        vicha.FILES.load(model, state, stage="entailment", teacher=teacher_of(model))
    retrieval, teacher, queue = tiny("retrieval")
    state = official(retrieval, teacher, None)
    with pytest.raises(CheckpointError, match="holds no queue; leave queue out"):
        vicha.FILES.load(retrieval, state, stage="retrieval", teacher=teacher, queue=queue)


def test_files_of_another_stage_are_refused():
    state = official(*tiny())
    with pytest.raises(
        CheckpointError, match=r"is a pretrain checkpoint of ViCHA or ALBEF where a vqa one is .*start_from"
    ):
        vicha.FILES.load(tiny("vqa")[0], state, stage="vqa")
    answers = official(*tiny("vqa"))
    with pytest.raises(CheckpointError, match="nothing can be converted"):
        vicha.FILES.load(tiny("retrieval")[0], answers, stage="retrieval")
    with pytest.raises(CheckpointError, match="vqa checkpoint; a entailment model starts from pretrain or"):
        vicha.FILES.start(tiny("entailment")[0], answers, stage="entailment")
    with pytest.raises(CheckpointError, match="no checkpoint of ViCHA or ALBEF; it holds encoder"):
        vicha.FILES.load(tiny()[0], {"encoder.weight": torch.ones(1)}, stage="pretrain")
    with pytest.raises(CheckpointError, match="1 unknown tensors: extra"):
        vicha.FILES.start(tiny("retrieval")[0], {**state, "extra.weight": torch.ones(1)}, stage="retrieval")


# Published BERT
# ------------------------------------------------------------------------------------------------------------


def published(layers: int = 4) -> tuple[nn.ModuleDict, dict[str, Tensor]]:
    """A published language model, and its state under Hugging Face's names."""
    from vlp_core.weights.bert import language_model_adapter

    torch.manual_seed(7)
    text = Bert(vocabulary=20, width=8, layers=layers, heads=2, hidden=8, positions=10)
    parts = nn.ModuleDict({"text": text, "mlm_head": MaskedLanguageHead(width=8, vocabulary=20)})
    state = language_model_adapter(text).to_source(parts.state_dict())
    extra = {"bert.pooler.dense.weight": torch.ones(8, 8), "cls.seq_relationship.weight": torch.ones(2, 8)}
    return parts, state | extra


@pytest.mark.parametrize("layers", [0, 2, 4])
def test_encoders_take_the_lower_layers_of_published_weights(layers):
    parts, state = published()
    words = Bert(vocabulary=20, width=8, layers=layers, heads=2, hidden=8, positions=10)
    result = load_published_layers(words, state)
    assert result.missing == ()
    theirs = parts["text"].state_dict()
    assert all(torch.equal(x, theirs[key]) for key, x in words.state_dict().items())


def test_an_answer_decoder_takes_layers_and_head_of_published_weights():
    parts, state = published()
    decoder = Bert(
        vocabulary=20, width=8, layers=2, heads=2, hidden=8, positions=10, fusion_layer=0, image_width=8
    )
    head = MaskedLanguageHead(width=8, vocabulary=20)
    result = load_published_layers(decoder, state, head=head)
    assert all(".cross" in key for key in result.missing)
    assert len(result.missing) == sum(".cross" in key for key in decoder.state_dict())
    assert_same(head, parts["mlm_head"])
    with pytest.raises(CheckpointError, match=r"missing: text\.layers"):
        load_published_layers(decoder, published(layers=1)[1])
