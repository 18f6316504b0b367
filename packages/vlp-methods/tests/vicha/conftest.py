"""A tiny ViCHA on the tiny shapes world."""

from pathlib import Path

import pytest


@pytest.fixture
def tiny(tiny_of) -> tuple[str, ...]:
    return tiny_of("vicha")


@pytest.fixture
def pretrained(pretrained_of) -> Path:
    return pretrained_of("vicha")
