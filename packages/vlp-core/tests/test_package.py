"""What importing costs, and lazy submodules."""

import subprocess
import sys

import pytest
import vlp_core

HEAVY = ("timm", "torchvision", "transformers", "scipy", "pydantic")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize("module", ["vlp_core", "vlp_core.vision", "vlp_core.weights"])
def test_import_loads_no_heavy_library(module):
    assert not loaded_after(f"import {module}") & set(HEAVY)


def test_the_package_alone_does_not_load_torch():
    assert "torch" not in loaded_after("import vlp_core; vlp_core.__version__")


def test_submodules_are_attributes():
    found = loaded_after("import vlp_core; vlp_core.vision.SwinTransformer")
    assert {"vlp_core.vision.swin", "torch"} <= found


def test_every_listed_submodule_can_be_imported():
    for name in vlp_core.__all__:
        assert getattr(vlp_core, name).__name__ == f"vlp_core.{name}"
    assert set(vlp_core.__all__) <= set(dir(vlp_core))


def test_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="'vlp_core' has no attribute 'visoin'"):
        vlp_core.visoin  # noqa: B018 (the access itself is the test)
