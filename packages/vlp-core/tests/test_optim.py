import copy
import re

import pytest
import torch
from torch import nn
from vlp_core.optim import AdamW, MuonAndAdamW, ParameterRule, layer_rules, parameter_groups
from vlp_core.schedule import linear


@pytest.mark.golden("xvlm", lambda case: "groups" in case.config and "schedule" in case.config)
def test_steps_and_rates_equal_the_reference(case):
    config, inputs, expected = case.config, case.tensors("inputs"), case.tensors("outputs")
    parameters = {g["param"]: nn.Parameter(inputs[f"{g['param']}0"].clone()) for g in config["groups"]}
    optimizer = AdamW(
        [
            {
                "params": [parameters[g["param"]]],
                "lr": config["lr"] * g["lr_mult"],
                "weight_decay": g["weight_decay"],
            }
            for g in config["groups"]
        ],
        betas=config["betas"],
        eps=config["eps"],
    )
    base = [group["lr"] for group in optimizer.param_groups]
    plan = config["schedule"]
    steps = sum(name.startswith("lr") for name in expected)
    assert steps > 0
    for step in range(steps):
        factor = linear(step, warmup=plan["num_warmup_steps"], total_steps=plan["num_training_steps"])
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected[f"lr{step}"].tolist())
        for name, parameter in parameters.items():
            parameter.grad = inputs[f"g{name}{step}"]
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), expected[f"{name}{step}"], rtol=1e-4, atol=1e-5)


def test_update_is_the_documented_formula():
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.5)
    value, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate((0.3, -1e-4, 0.2), start=1):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        value -= 0.1 * (1 - 0.98**t) ** 0.5 / (1 - 0.9**t) * m / (v**0.5 + 1e-3)
        value -= 0.1 * 0.5 * value
        assert p.item() == pytest.approx(value, rel=1e-12)


def test_updates_do_not_depend_on_company_or_memory_order():
    """In one group: a late starter, and parameter, gradient and state that lie in memory in different
    orders."""
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 2, generator=generator), torch.randn(3, 3, 2, generator=generator)

    def alone(gradients: torch.Tensor) -> torch.Tensor:
        p = nn.Parameter(start.clone())
        optimizer = AdamW([p], lr=0.1, eps=1e-3, weight_decay=0.5)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach()

    late, transposed = nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous().t())
    optimizer = AdamW([late, transposed], lr=0.1, eps=1e-3, weight_decay=0.5)
    for step, gradient in enumerate(gradients):
        late.grad = gradient.t().contiguous().t() if step else None
        transposed.grad = gradient.clone() if step else gradient.t().contiguous().t()
        optimizer.step()
        if step == 1:
            optimizer.state[transposed]["mean"] = optimizer.state[transposed]["mean"].contiguous()
    torch.testing.assert_close(late.detach(), alone(gradients[1:]))
    torch.testing.assert_close(transposed.detach(), alone(gradients))


def test_no_gradient_means_no_decay_and_no_step():
    with_gradient, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([with_gradient, without], lr=0.1, weight_decay=0.5)
    with_gradient.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(without.detach(), torch.ones(2))
    assert without not in optimizer.state
    assert optimizer.state[with_gradient]["step"] == 1


def test_saved_state_continues_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    data = torch.randn(6, 4, 3)

    def train(model: nn.Module, optimizer: AdamW, batches: torch.Tensor) -> None:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()

    train(model, optimizer, data[:3])
    other = copy.deepcopy(model)
    again = AdamW(other.parameters(), lr=0.1, weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[3:])
    train(other, again, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(isinstance(v, torch.Tensor) for s in again.state_dict()["state"].values() for v in s.values())


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": -1}, {"weight_decay": -1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="must not be negative"):
        AdamW([nn.Parameter(torch.ones(1))], **bad)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(groups: list[dict]) -> list[tuple[float, float, list[str]]]:
    return [(g["lr"], g["weight_decay"], g["names"]) for g in groups]


def test_first_rule_that_speaks_decides_each_property():
    rules = [
        ParameterRule(pattern=r"^head\.bias", decay=True),
        ParameterRule(pattern=r"bias|norm", decay=False),
        ParameterRule(pattern=r"^head", lr_scale=2.0),
    ]
    groups = parameter_groups(Toy(), lr=0.1, weight_decay=0.01, rules=rules)
    assert names(groups) == [
        (0.1, 0.01, ["body.weight"]),
        (0.1, 0.0, ["body.bias", "norm.weight", "norm.bias"]),
        (0.2, 0.01, ["head.weight", "head.bias"]),
    ]
    assert [len(g["params"]) for g in groups] == [1, 3, 2]


def test_without_rules_everything_decays():
    (group,) = parameter_groups(Toy(), lr=0.1, weight_decay=0.01, rules=[])
    assert len(group["names"]) == 6


def test_a_rule_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"no trainable parameter matches 'hed'"):
        parameter_groups(Toy(), lr=0.1, weight_decay=0.01, rules=[ParameterRule(pattern="hed", lr_scale=2.0)])


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        parameter_groups(Toy().requires_grad_(False), lr=0.1, weight_decay=0.01, rules=[])


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


def scales(groups):
    return {name: group["lr_scale"] for group in groups for name in group["names"]}


def test_learning_rates_fall_from_layer_to_layer():
    """As the table of VLC: rate^(N - id) with N = depth + 1."""
    rules = layer_rules(Tower(), rate=0.5, blocks=r"blocks\.(\d+)\.", first=["embedding"])
    found = scales(parameter_groups(Tower(), lr=1.0, weight_decay=0.0, rules=rules))
    assert found["embedding.weight"] == 0.5**4
    assert [found[f"blocks.{i}.bias"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert found["head.weight"] == 1
    frozen = Tower()
    frozen.blocks[0].requires_grad_(False)
    rules = layer_rules(frozen, rate=0.5, blocks=r"blocks\.(\d+)\.")
    found = scales(parameter_groups(frozen, lr=1.0, weight_decay=0.0, rules=rules))
    assert found["blocks.1.weight"] == 0.5**2
    with pytest.raises(ValueError, match="no parameter matches 'layers"):
        layer_rules(Tower(), rate=0.5, blocks=r"layers\.(\d+)\.")
    with pytest.raises(ValueError, match="no parameter matches 'patch'"):
        layer_rules(Tower(), rate=0.5, blocks=r"blocks\.(\d+)\.", first=["patch"])


VLC_FIRST = (
    r"^transformer\.(cls_token|pos_embed|mask_token)$",
    r"^transformer\.patch_embed",
    "^text_embeddings",
    "^token_type_embeddings",
)
MAE_FIRST = ("^cls_token$", "^pos_embed$", "^patch_embed")


@pytest.mark.golden("vlc", lambda case: case.name == "layer_decay")
def test_layer_decay_equals_the_tables_of_vlc_and_mae(case):
    """{name: [factor on lr, weight decay]}; fine-tuning by 0.5 (VLC) and 0.65 (MAE on ImageNet)."""
    tables = [path for path in sorted(case.path.glob("*.json")) if "pretrain" not in path.stem]
    assert len(tables) >= 5
    for path in tables:
        table = {name: values for name, values in case.json(path.stem).items() if len(values) == 2}
        model = nn.Module()
        for name, (_, decay) in table.items():
            *parents, last = name.split(".")
            inside = model
            for parent in parents:
                if not hasattr(inside, parent):
                    inside.add_module(parent, nn.Module())
                inside = getattr(inside, parent)
            inside.register_parameter(last, nn.Parameter(torch.zeros((1, 1) if decay else (1,))))
        mae = path.stem.startswith("imagenet")
        first = [
            pattern
            for pattern in (MAE_FIRST if mae else VLC_FIRST)
            if any(re.search(pattern, n) for n in table)
        ]
        blocks = r"^blocks\.(\d+)\." if mae else r"^transformer\.blocks\.(\d+)\."
        rules = [
            ParameterRule(pattern="", below_axes=2, decay=False),
            *layer_rules(model, rate=0.65 if mae else 0.5, blocks=blocks, first=first),
        ]
        groups = parameter_groups(model, lr=1.0, weight_decay=0.05 if mae else 0.01, rules=rules)
        found = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
        assert found.keys() == table.keys()
        for name, expected in table.items():
            assert found[name] == pytest.approx(expected), (path.stem, name)


def test_rules_by_number_of_axes_and_by_schedule():
    rules = [
        ParameterRule(pattern="", below_axes=2, decay=False),
        ParameterRule(pattern="^head", schedule="slow"),
    ]
    groups = parameter_groups(Tower(), lr=1.0, weight_decay=0.1, rules=rules)
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {name for name, value in decay.items() if value} == {
        "embedding.weight",
        "head.weight",
        *(f"blocks.{i}.weight" for i in range(3)),
    }
    named = {name: group.get("schedule") for group in groups for name in group["names"]}
    assert {name for name, schedule in named.items() if schedule == "slow"} == {"head.weight", "head.bias"}


def test_muon_takes_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    tower, twin = Tower(), Tower()
    twin.load_state_dict(tower.state_dict())
    options = {"lr": 0.1, "weight_decay": 0.01}
    groups = parameter_groups(tower, rules=[], **options)
    optimizer = MuonAndAdamW(groups, **options, not_muon=["embedding", "head"])
    named = dict(twin.named_parameters())
    matrices = [named[f"blocks.{i}.weight"] for i in range(3)]
    rest = [p for p in twin.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    adamw = torch.optim.AdamW(rest, **options)
    for step in range(4):
        if step == 2:  # a checkpoint between: groups and state stay those of one optimizer
            optimizer.load_state_dict(optimizer.state_dict())
        for model, optimizers in ((tower, [optimizer]), (twin, [muon, adamw])):
            model.zero_grad()
            model(torch.arange(5)).square().sum().backward()
            for one in optimizers:
                one.step()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no matrix of the model matches 'nothing'"):
        MuonAndAdamW(parameter_groups(Tower(), rules=[], **options), not_muon=["nothing"])
    with pytest.raises(ValueError, match="none is left for it"):
        MuonAndAdamW(parameter_groups(Tower(), rules=[], **options), not_muon=["weight"])
