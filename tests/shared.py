"""Recorded evidence lies beside the project, not in it: tests that read it skip, with a reason, in a plain clone."""

import os
from pathlib import Path

import pytest

_DATA = Path(os.environ.get("KEYTURN_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared_data(relative: str) -> Path:
    """The file or folder below the shared data, or a skip."""
    path = _DATA / relative
    if not path.exists():
        pytest.skip(f"recorded evidence is not here: {relative} (set KEYTURN_SHARED_DATA)")
    return path
