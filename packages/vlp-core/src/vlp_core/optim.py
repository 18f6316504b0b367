"""AdamW as X-VLM and its relatives used it, and parameter groups by rules on names."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class MuonAndAdamW(Optimizer):
    """Muon for matrices, `torch.optim.AdamW` for everything else, as one optimizer.

    Updates of Muon are scaled to the size that AdamW's have (`match_rms_adamw`), so both take the same
    learning rate and weight decay.

    Args:
        groups: Parameter groups with names, as of `parameter_groups`; a group is split where it has both.
        lr: Learning rate of groups without one.
        weight_decay: Decoupled weight decay of groups without one.
        betas: Decay of AdamW's two moments.
        eps: Added to the root of AdamW's second moment.
        momentum: Decay of Muon's running gradient.
        nesterov: Whether Muon looks ahead.
        not_muon: Regular expressions on names of matrices that AdamW takes, such as embeddings.

    Raises:
        ValueError: An expression of `not_muon` finds no matrix, or Muon would have nothing to do.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers" (2024); scaling: arXiv 2502.16982.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        not_muon: Sequence[str] = (),
    ) -> None:
        found: set[str] = set()
        split: list[dict[str, Any]] = []
        for group in groups:
            parts: dict[bool, dict[str, Any]] = {}
            for name, parameter in zip(group["names"], group["params"], strict=True):
                matches = [pattern for pattern in not_muon if re.search(pattern, name)]
                matrix = parameter.ndim == 2
                found |= set(matches if matrix else ())
                part = parts.setdefault(
                    matrix and not matches,
                    {**group, "params": [], "names": [], "muon": matrix and not matches},
                )
                part["params"].append(parameter)
                part["names"].append(name)
            split += [parts[key] for key in sorted(parts)]
        if missing := [pattern for pattern in not_muon if pattern not in found]:
            raise ValueError(f"no matrix of the model matches {', '.join(map(repr, missing))}")
        if not any(group["muon"] for group in split):
            raise ValueError("Muon takes matrices, and none is left for it")
        common = {"lr": lr, "weight_decay": weight_decay}
        self.adamw = self.muon = None
        mine = [group for group in split if group["muon"]]
        others = [group for group in split if not group["muon"]]
        self.muon = torch.optim.Muon(
            mine, momentum=momentum, nesterov=nesterov, adjust_lr_fn="match_rms_adamw", **common
        )
        if others:
            self.adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **common)
        parts_ = [part for part in (self.muon, self.adamw) if part is not None]
        super().__init__([group for part in parts_ for group in part.param_groups], common)
        self._share()

    def _share(self) -> None:
        """Both parts work on the groups and the state of this optimizer."""
        for part, muon in ((self.muon, True), (self.adamw, False)):
            if part is not None:
                part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
                part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()  # someone may have taken parameters out of the groups
        for part in (self.muon, self.adamw):
            if part is not None:
                part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class."""
        super().load_state_dict(state_dict)
        self._share()


@dataclass(frozen=True, kw_only=True)
class ParameterRule:
    """What holds for parameters whose name contains a match of `pattern` (regular expression, searched
    anywhere)."""

    pattern: str
    """Regular expression on our parameter names."""
    below_axes: int | None = None
    """Only parameters with fewer axes than this: 2 leaves out matrices and kernels."""
    decay: bool | None = None
    """Whether weight decay applies; None leaves it to other rules (default: it applies)."""
    lr_scale: float | None = None
    """Factor on the learning rate; None leaves it to other rules (default: 1)."""
    schedule: str | None = None
    """Name of a learning-rate schedule; None leaves it to other rules (default: that of the run)."""


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, rules: Sequence[ParameterRule]
) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, by the first rule that says something about a name.

    Returns one group for each (learning-rate factor, decay or not, schedule) that occurs, in order of the
    factor, decayed ones first: {"params", "names", "lr", "lr_scale", "weight_decay"}, and "schedule" where a
    rule names one.

    Raises:
        ValueError: A rule matches no parameter, so it cannot do what it says; or the model has nothing to
            train.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    matched: set[ParameterRule] = set()
    groups: dict[tuple[float, bool, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay: bool | None = None
        scale: float | None = None
        schedule: str | None = None
        for pattern, rule in compiled:
            few_axes = rule.below_axes is None or parameter.ndim < rule.below_axes
            if few_axes and pattern.search(name):
                matched.add(rule)
                decay = rule.decay if decay is None else decay
                scale = rule.lr_scale if scale is None else scale
                schedule = rule.schedule if schedule is None else schedule
        decay, scale = decay is not False, 1.0 if scale is None else scale
        group = groups.setdefault(
            (scale, not decay, schedule or ""),
            {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decay else 0.0,
                **({} if schedule is None else {"schedule": schedule}),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("no parameter of the model is trainable")
    if unused := [repr(rule.pattern) for rule in rules if rule not in matched]:
        raise ValueError(f"no trainable parameter matches {', '.join(unused)}")
    return [groups[key] for key in sorted(groups)]


def layer_rules(
    model: nn.Module, *, rate: float, blocks: str, first: Sequence[str] = ()
) -> list[ParameterRule]:
    """Rules for learning rates that fall from layer to layer: block i of n, counted from 0, has the factor
    rate^(n - i), what lies before the blocks rate^(n + 1); nothing is said about the rest.

    Args:
        model: Model with the blocks.
        rate: Factor from one block to the next below.
        blocks: Regular expression with one group, which finds the number of a block in a parameter's name.
        first: Regular expressions on names of parameters that lie before the first block.

    Raises:
        ValueError: `blocks` or one of `first` finds nothing.

    Source: BEiT (arXiv 2106.08254); MAE `util/lr_decay.py`; VLC specification 4.3.
    """
    names = dict(model.named_parameters())
    numbers = {name: int(match[1]) for name in names if (match := re.search(blocks, name))}
    if not numbers:
        raise ValueError(f"layer decay: no parameter matches {blocks!r}")
    depth = 1 + max(numbers.values())
    layers: dict[int, list[str]] = {}
    for pattern in first:
        before = [name for name in names if re.search(pattern, name)]
        if not before:
            raise ValueError(f"layer decay: no parameter matches {pattern!r}")
        layers.setdefault(-1, []).extend(before)
    for name, number in numbers.items():
        layers.setdefault(number, []).append(name)
    rules = []
    for number, members in sorted(layers.items()):
        trained = [re.escape(name) for name in members if names[name].requires_grad]
        if trained:
            pattern = rf"\A(?:{'|'.join(trained)})\Z"
            rules.append(ParameterRule(pattern=pattern, lr_scale=rate ** (depth - number)))
    return rules
