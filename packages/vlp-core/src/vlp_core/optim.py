"""AdamW as X-VLM and its relatives used it, and parameter groups by rules on names."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamW(Optimizer):
    """AdamW in the variant of transformers before 5.0.

    With t counting the updates of each parameter:  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p -= lr sqrt(1-b2^t) / (1-b1^t) * m / (sqrt(v) + eps);  then  p -= lr * weight_decay * p.

    Two things differ from `torch.optim.AdamW`: eps is not divided by sqrt(1-b2^t), which matters for tiny
    gradients early on, and the decay comes after the update. A parameter without gradient is left alone: no
    decay, no step counted. Updates run in PyTorch's fused kernel; the state is tensors only (`step`, `mean`,
    `square`).

    Args:
        params: Parameters or groups; groups may set `lr`, `betas`, `eps`, `weight_decay`.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, eps={eps} and weight_decay={weight_decay} must not be negative, betas={betas} "
                "must lie in 0..1"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            # The kernel takes one device, dtype and number of updates per call.
            by_kind: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
            for parameter in parameters:
                step = self._count(parameter)
                by_kind.setdefault((parameter.device, parameter.dtype, step), []).append(parameter)
            for (_, _, step), members in by_kind.items():
                self._update(members, group, step)
        return loss

    def _count(self, parameter: Tensor) -> float:
        """Number of updates of a parameter, this one included."""
        state = self.state[parameter]
        if not state:
            # On the CPU, so that reading it never waits for the device.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state["step"].item()

    def _update(self, parameters: list[Tensor], group: dict[str, Any], step: float) -> None:
        if any(parameter.grad.is_sparse for parameter in parameters):
            raise ValueError("AdamW does not support sparse gradients")
        (beta1, beta2), lr = group["betas"], group["lr"]
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            for name in ("mean", "square"):
                state[name] = in_memory_order_of(parameter, state[name])
        torch._fused_adamw_(
            parameters,
            [in_memory_order_of(parameter, parameter.grad) for parameter in parameters],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [torch.full((), step, device=parameters[0].device)] * len(parameters),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            # The kernel divides the root of the second moment by this before it adds eps; so eps / it is our
            # eps.
            eps=group["eps"] / (1 - beta2**step) ** 0.5,
            amsgrad=False,
            maximize=False,
        )
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, which would move `step` to the device of its parameter; it belongs on the
        CPU."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].to(device="cpu", dtype=torch.float32)


def in_memory_order_of(parameter: Tensor, x: Tensor) -> Tensor:
    """`x`, copied only if its strides are not those of the parameter: the fused kernel goes through the
    memory of both in order."""
    return x if x.stride() == parameter.stride() else torch.empty_like(parameter).copy_(x)


@dataclass(frozen=True, kw_only=True)
class ParameterRule:
    """What holds for parameters whose name contains a match of `pattern` (regular expression, searched
    anywhere)."""

    pattern: str
    """Regular expression on our parameter names."""
    decay: bool | None = None
    """Whether weight decay applies; None leaves it to other rules (default: it applies)."""
    lr_scale: float | None = None
    """Factor on the learning rate; None leaves it to other rules (default: 1)."""


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, rules: Sequence[ParameterRule]
) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, by the first rule that says something about a name.

    Returns one group for each (learning-rate factor, decay or not) that occurs, in order of the factor,
    decayed ones first: {"params", "names", "lr", "lr_scale", "weight_decay"}.

    Raises:
        ValueError: A rule matches no parameter, so it cannot do what it says; or the model has nothing to
            train.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    matched: set[str] = set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay: bool | None = None
        scale: float | None = None
        for pattern, rule in compiled:
            if pattern.search(name):
                matched.add(rule.pattern)
                decay = rule.decay if decay is None else decay
                scale = rule.lr_scale if scale is None else scale
        decay, scale = decay is not False, 1.0 if scale is None else scale
        group = groups.setdefault(
            (scale, not decay),
            {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model is trainable")
    if unused := [rule.pattern for rule in rules if rule.pattern not in matched]:
        raise ValueError(f"no trainable parameter matches {', '.join(map(repr, unused))}")
    return [groups[key] for key in sorted(groups)]
