import copy

import pytest
import torch
from torch import nn
from vlp_core.optim import AdamW, ParameterRule, parameter_groups
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
