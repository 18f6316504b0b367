"""What is known about the compiled libraries in a folder; imports no torch, for setup.py."""

import hashlib
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def read_record(folder: Path = PACKAGE) -> dict[str, Any]:
    """What was recorded when the package was installed: {} when nothing was."""
    file = folder / "_build.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def digest(device: str) -> str:
    """Tells one state of the sources from another: a library built in place outlives an upgrade of the
    package."""
    found = hashlib.sha256()
    for file in sorted((PACKAGE / "csrc" / device).iterdir()):
        if file.is_file():
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]
