"""A tiny X-VLM on the tiny shapes world."""

from pathlib import Path

import pytest


@pytest.fixture
def tiny(tiny_of) -> tuple[str, ...]:
    return tiny_of("xvlm")


@pytest.fixture
def pretrained(pretrained_of) -> Path:
    return pretrained_of("xvlm")
