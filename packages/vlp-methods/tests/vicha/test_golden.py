"""Every task of ViCHA on the golden cases: the recipe's own task, made by its builder and started from the
official weights of the case as a run would be, teacher and queue included."""

import pytest
import torch
from vlp_core import models
from vlp_core.models.vicha import checkpoints as official
from vlp_core.recipe import inline
from vlp_data.batch import Concepts, EntailmentBatch, ImageTextBatch, NlvrBatch, RetrievalBatch, VqaBatch

UNMEASURED = ("data.val=null", "data.test=null", "evaluate={every: null, best: null}")
TIED = ("text_encoder.cls.predictions.decoder.weight", "text_encoder.cls.predictions.decoder.bias")
"""Second names in the reference, whose gradients it states twice."""


@pytest.fixture
def words(vocabulary):
    """`words(case)`: overrides that make a recipe of this package build the model of a case."""

    def of(case) -> tuple[str, ...]:
        config, bert = case.config, case.config["bert"]
        vision = {
            "kind": "vit",
            "image_size": config["image_res"],
            "patch": config["patch_size"],
            "width": config["vision_width"],
            "depth": config["vit_depth"],
            "heads": config["vit_heads"],
            "local_depth": 0,
        }
        text = {
            "kind": "bert",
            "width": bert["hidden_size"],
            "layers": bert["num_hidden_layers"],
            "heads": bert["num_attention_heads"],
            "hidden": bert["intermediate_size"],
            "positions": bert["max_position_embeddings"],
            "fusion_layer": bert["fusion_layer"],
        }
        files = vocabulary("bert", bert["vocab_size"])
        concepts = "kw_proj.weight" in case.tensor_names("weights")
        layers = config["num_hidden_layers_kw"] if concepts else 0
        return (
            f"model.vision={inline(vision)}",
            f"model.text={inline(text)}",
            f"model.concepts={{layers: {layers}}}" if concepts else "model.concepts=null",
            *(() if concepts else ("data.concepts=null",)),
            f"model.weights.model={case.path / 'weights.safetensors'}",
            f"data.tokenizer={inline({'kind': 'wordpiece', 'files': files})}",
            f"data.view.size={config['image_res']}",
            f"data.root={case.path}",
            "data.world=null",
        )

    return of


def contrast(case, *, queue: bool = True) -> tuple[str, ...]:
    """Overrides of tasks with a shared space."""
    config = case.config
    found = (f"model.embed_width={config['embed_dim']}",)
    return (*found, teacher(case, queue=config["queue_size"]), "data.train.batch=2") if queue else found


def teacher(case, **more: object) -> str:
    options = {"momentum": case.config["momentum"], "alpha": case.config["alpha"], **more}
    return f"teacher={inline(options)}"


def texts(values: dict) -> dict:
    return {
        "keys": (),
        "image": values["image"],
        "text_ids": values["text_ids"],
        "attention_mask": values["text_mask"],
    }


def concepts(values: dict, prefix: str = "kw", field: str = "concepts") -> dict:
    """A field of a batch."""
    return {field: Concepts(values[f"{prefix}_ids"], values[f"{prefix}_mask"])}


@pytest.fixture
def check_gradients(assert_gradients):
    def check(case, model) -> None:
        adapter = official.vicha_adapter(model)
        names = adapter.to_source(model.state_dict())
        firsts: dict[int, str] = {}
        seconds = [key for key, x in names.items() if firsts.setdefault(id(x), key) != key]
        grads = case.json("grads")
        # Both names of one tensor carry the same number in the case; here the first has the gradient.
        assert_gradients(model, adapter, grads, seconds=(*TIED, *seconds))

    return check


def assert_sums(found, expected, *, step: float = 0.0) -> None:
    """Sum and L2 norm of each tensor, after an update whose largest step is `step`.

    Adam blows a gradient that is rounding noise up to a full step of either sign. A bias of keys moves no
    attention weight, so all its gradients are noise; elsewhere one number may be, which shows in the sum.
    """
    assert expected.keys() - found.keys() <= {*TIED}
    for name in expected.keys() & found.keys():
        noisy = 0
        if name.endswith(("attention.self.key.bias", "crossattention.self.key.bias")):
            noisy = len(found[name])
        elif name.endswith("attn.qkv.bias"):
            noisy = len(found[name]) // 3
        off = 2 * step * noisy
        total, norm = found[name].double().sum().item(), found[name].double().norm().item()
        assert total == pytest.approx(expected[name][0], rel=1e-4, abs=2e-4 + 2 * step + off), name
        assert norm == pytest.approx(expected[name][1], rel=1e-4, abs=2e-5 + off), name


def after_forward(task) -> dict[str, torch.Tensor]:
    """Teacher and queue under the reference's names."""
    return official.FILES.to_source(task.model, teacher=task.momentum.teacher, queue=task.queue)


@pytest.mark.golden("vicha", lambda case: {"mlm_input_ids", "loss_mlm"} <= case.tensor_names("outputs"))
def test_pretraining_and_the_step_after(case, words, build, draws, assert_equal, check_gradients):
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    parts = {name.partition(".")[0] for name in case.tensor_names("weights")}
    hierarchy = masked_image = None
    if "vision_proj_hidden" in parts:
        hierarchy = {
            "levels": config["num_hidden_align"],
            "weights": [float(weight) for weight in config["ita_hidden_weights"]],
            "weight": config["ita_hidden_weight"],
        }
    if "mask_token" in parts:
        masked_image = {
            "by": "both" if "mae_proj_uni" in parts else "decoder" if "decoder_blocks" in parts else "fusion",
            "width": config["decoder_embed_dim"],
            "depth": config["decoder_depth"],
            "heads": config["decoder_num_heads"],
            "ratio": config["mask_ratio"],
            "weight": config.get("mae_lambda", 1.0),
        }
    step = config["adamw_step"]
    job = build(
        "vicha/shapes",
        *words(case),
        *contrast(case),
        "data.test=null",
        f"model.hierarchy={inline(hierarchy)}",
        f"model.masked_image={inline(masked_image)}",
        f"optimizer={{variant: torch, lr: {step['lr']}, weight_decay: {step['weight_decay']}}}",
    )
    task, model = job.task, job.task.model
    labels = expected["mlm_labels"]
    batch = ImageTextBatch(
        **texts(inputs),
        **(concepts(inputs) if model_has_concepts(case) else {}),
        masked_ids=expected["mlm_input_ids"],
        masked_positions=torch.arange(labels.shape[1]).expand_as(labels),
        masked_labels=labels,
    )
    draws(
        multinomial=[expected["neg_image_idx"][:, None], expected["neg_text_idx"][:, None]],
        rand=[inputs["mim_noise"]] if "mim_noise" in inputs else [],
    )
    task.before_forward(0)
    losses = task(batch)
    total = torch.stack(list(losses.values())).sum()
    found = {
        "loss_mlm": losses["mlm"],
        "loss_itm": losses["itm"],
        "loss_ita_main": losses["itc"],
        "loss_ita": losses["itc"] + losses.get("hidden", 0),
        "loss_total": total,
        "image_queue_after": task.queue.image.t(),
        "text_queue_after": task.queue.text.t(),
    }
    assert ("hidden" in losses, "mim" in losses) == (hierarchy is not None, masked_image is not None)
    if masked_image is not None:
        found["loss_mim"] = losses["mim"]
    after = after_forward(task)
    found |= {key: after[key.removeprefix("after.")] for key in expected if key.startswith("after.")}
    assert_equal(found, expected)
    assert task.queue.pointer == expected["queue_ptr_after"]
    total.backward()
    assert all(p.grad is None for p in task.momentum.parameters())
    check_gradients(case, model)
    assert_sums(after, case.json("momentum_after"))
    job.optimizer.step()
    state = official.vicha_adapter(model).to_source(model.state_dict())
    assert_sums(state, case.json("after_adamw_step"), step=step["lr"])


def model_has_concepts(case) -> bool:
    return "kw_proj.weight" in case.tensor_names("weights")


@pytest.mark.golden("vicha", lambda case: {"idx_queue_after", "loss_ita"} <= case.tensor_names("outputs"))
@pytest.mark.parametrize("recipe", ["shapes_retrieval", "shapes_grounding"])
def test_retrieval_and_grounding(case, recipe, words, build, draws, assert_equal, check_gradients):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    heat = f"heat.layer={case.config['bert']['fusion_layer']}"
    more = (heat,) if recipe == "shapes_grounding" else ()
    job = build(f"vicha/{recipe}", *words(case), *contrast(case), *UNMEASURED, *more)
    draws(multinomial=[expected["neg_image_idx"][:, None], expected["neg_text_idx"][:, None]])
    job.task.before_forward(0)
    losses = job.task(RetrievalBatch(**texts(inputs), **concepts(inputs), image_ids=inputs["idx"].flatten()))
    total = losses["itc"] + losses["itm"]
    after = after_forward(job.task)
    found = {"loss_ita": losses["itc"], "loss_itm": losses["itm"], "loss_total": total}
    found |= {
        f"{name}_after": after[name] for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    }
    assert_equal(found, expected)
    total.backward()
    check_gradients(case, job.task.model)


@pytest.mark.golden("vicha", lambda case: {"answer_ids", "candidate_ids"} <= case.tensor_names("inputs"))
@pytest.mark.parametrize("taught", [False, True])
def test_questions(case, taught, words, build, assert_equal, check_gradients):
    """The loss of the reference has no teacher, though it runs one; the case states the loss with it, too."""
    x, expected = case.tensors("inputs"), case.tensors("outputs")
    job = build(
        "vicha/shapes_vqa",
        *words(case),
        *UNMEASURED,
        teacher(case) if taught else "teacher=null",
        "data.candidates=''",
        "answers={mode: generate}",
    )
    counts = x["answers_per_question"]
    batch = VqaBatch(
        keys=(),
        image=x["image"],
        **concepts(x),
        question_ids=x["text_ids"],
        question_mask=x["text_mask"],
        answer_ids=x["answer_ids"],
        answer_mask=x["answer_mask"],
        answer_weights=x["answer_weights"],
        question_index=torch.arange(len(counts)).repeat_interleave(counts),
    )
    job.task.before_forward(0)
    loss = job.task(batch)["answers"]
    assert_equal({"loss_with_distillation" if taught else "loss_total": loss}, expected)
    if not taught:
        loss.backward()
        check_gradients(case, job.task.model)


@pytest.mark.golden("vicha", lambda case: {"image", "targets"} <= case.tensor_names("inputs"))
def test_entailment(case, words, build, assert_equal, check_gradients):
    inputs = case.tensors("inputs")
    job = build("vicha/shapes_entailment", *words(case), *UNMEASURED, teacher(case))
    job.task.before_forward(0)
    losses = job.task(EntailmentBatch(**texts(inputs), **concepts(inputs), labels=inputs["targets"]))
    assert_equal({"loss_total": losses["labels"]}, case.tensors("outputs"))
    losses["labels"].backward()
    check_gradients(case, job.task.model)


@pytest.mark.golden("vicha", lambda case: {"image0", "image1", "targets"} <= case.tensor_names("inputs"))
@pytest.mark.parametrize(("kind", "loss"), [("as_released", "loss_total"), ("loaded", "loss_true_teacher")])
def test_nlvr(case, kind, loss, words, build, assert_equal, check_gradients):
    inputs = case.tensors("inputs")
    inputs["image"] = torch.cat([inputs["image0"], inputs["image1"]])
    job = build("vicha/shapes_nlvr", *words(case), *UNMEASURED, teacher(case, kind=kind))
    if kind == "as_released":
        # It starts from random values; the case shows a later step, at which it has values of its own.
        file = case.path / "weights.safetensors"
        models.start_from(
            job.task.model, file, family="vicha", stage="nlvr", teacher=job.task.momentum.teacher
        )
    batch = NlvrBatch(
        **texts(inputs),
        **concepts(inputs, "kw1"),
        **concepts(inputs, "kw2", "second_concepts"),
        labels=inputs["targets"],
    )
    job.task.before_forward(0)
    losses = job.task(batch)
    assert_equal({loss: losses["labels"]}, case.tensors("outputs"))
    if loss == "loss_total":
        losses["labels"].backward()
        check_gradients(case, job.task.model)


@pytest.mark.golden("vicha", lambda case: {"rand_pair", "rand_order"} <= case.tensor_names("inputs"))
def test_nlvr_domain(case, words, build, draws, monkeypatch, assert_equal, check_gradients):
    inputs = case.tensors("inputs")
    job = build("vicha/shapes_nlvr_domain", *words(case), *contrast(case, queue=False))
    # The golden numbers take the two largest in order in place of the draw.
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, **_: weights.topk(count).indices)
    draws(rand=[torch.stack([inputs["rand_pair"], inputs["rand_order"]])])
    batch = RetrievalBatch(**texts(inputs), **concepts(inputs), image_ids=torch.arange(len(inputs["image"])))
    losses = job.task(batch)
    assert_equal({"loss_total": losses["assignment"]}, case.tensors("outputs"))
    losses["assignment"].backward()
    check_gradients(case, job.task.model)
