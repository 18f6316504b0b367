"""Options: checks, roots, and what importing them costs."""

import subprocess
import sys

import pytest
from vlp_data.options import (
    ConceptOptions,
    IndependentMasking,
    MaskingOptions,
    RegionOptions,
    TextOptions,
)


def test_options_and_sources_import_no_torch():
    program = (
        "import sys\n"
        "from vlp_data.options import ExpressionBoxSource, ImageTextSource, RegionSource\n"
        "print(sorted({'torch', 'numpy', 'cv2', 'PIL', 'tokenizers', 'fsspec', 'pickle'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_options_import_nothing_heavy():
    program = (
        "import sys, vlp_data.options\n"
        "print(sorted({'torch', 'numpy', 'cv2', 'PIL', 'tokenizers', 'fsspec'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextOptions(max_tokens=1), "max_tokens=1 leaves no room"),
        (lambda: TextOptions(max_tokens=2, separator=True), "max_tokens=2 leaves no room"),
        (lambda: MaskingOptions(max_masks=0), "max_masks=0 must be positive"),
        (lambda: MaskingOptions(probability=-0.1), "probability=-0.1 must lie"),
        (lambda: IndependentMasking(probability=1.5), "probability=1.5 must lie"),
        (lambda: ConceptOptions(max_tokens=1), "max_tokens=1 leaves no room for a concept"),
        (lambda: ConceptOptions(share=0.0), r"share=0\.0 must lie in \(0, 1\]"),
        (lambda: RegionOptions(min_visible=2), "min_visible=2 must lie"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
