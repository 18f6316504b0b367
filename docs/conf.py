"""Sphinx settings; the API pages and the table of recipes are written from the sources before each build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

generate.write_all(Path(__file__).parents[1], Path(__file__).parent / "api")

project = "vlp"
copyright = "2026, the vlp authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "vlp"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nitpicky = True
