"""Helpers of the vlp_ops tests: closeness by the tolerances of the golden cases, operator arguments from a
case."""

import os

import pytest
import torch
import vlp_ops  # noqa: F401  (defines the operators)
from torch import Tensor

# A library with other kernels for the CPU key: test_cuda_sources.py runs the CUDA sources that way.
if os.environ.get("VLP_OPS_TEST_LIBRARY"):
    torch.ops.load_library(os.environ["VLP_OPS_TEST_LIBRARY"])

# The tolerance of a sum of n products follows from n, not from what one machine gave: rounding errors of
# either sign add up like sqrt(n) (Higham and Mary 2019, doi 10.1137/18M1226312), and libraries order their
# sums differently. The factor is four rounding errors; sums of fewer than 64 count as 64, the width of the
# golden cases, and because the other steps of an operator (softmax, bilinear weights) round, too.
FACTOR, LEAST_DEPTH = 4.0, 64
# A gradient passes a second sum, of which the depth is rarely known; it is given five times as much.
OF_GRADIENT = 5.0
EXACT = {torch.float64: 1e-10, torch.float32: 0.0}


def limit_of(dtype: torch.dtype, depth: int, of_gradient: bool = False) -> float:
    """Largest allowed error of a sum of `depth` products against the largest of all results."""
    rounding = FACTOR * torch.finfo(dtype).eps * max(depth, LEAST_DEPTH) ** 0.5
    return max((OF_GRADIENT if of_gradient else 1.0) * rounding, (10 if of_gradient else 1) * EXACT[dtype])


class Closeness:
    """Largest error against the largest value of the expected tensor; `depth`: products in each sum."""

    @staticmethod
    def relative(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
        if expected.numel() == 0:
            return 0.0
        actual, expected = actual.detach().double(), expected.double()
        assert torch.isfinite(actual).all()
        largest = expected.abs().max().item()
        error = (actual - expected).abs().max().item()
        return error / largest if largest > 0 else error

    def forward(
        self,
        actual: Tensor,
        expected: Tensor,
        name: str = "output",
        tolerance: float | None = None,
        *,
        depth: int = 1,
    ) -> None:
        limit = limit_of(actual.dtype, depth) if tolerance is None else tolerance
        error = self.relative(actual, expected)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"

    def gradient(
        self,
        actual: Tensor | None,
        expected: Tensor,
        name: str,
        tolerance: float | None = None,
        *,
        depth: int = 1,
    ) -> None:
        assert actual is not None, f"{name} has no gradient"
        limit = limit_of(actual.dtype, depth, of_gradient=True) if tolerance is None else tolerance
        # Scalar gradients are sums of many terms of both signs.
        if tolerance is None and expected.numel() == 1 and actual.dtype == torch.float32:
            limit = 1e-4
        error = self.relative(actual, expected)
        assert error <= limit, f"gradient of {name}: relative error {error:.2e} > {limit:.0e}"


@pytest.fixture
def close() -> Closeness:
    return Closeness()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def leaf(device: torch.device):
    """A float tensor of a golden case as a leaf that wants a gradient; integers as they are."""

    def make(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, dtype).requires_grad_()

    return make
