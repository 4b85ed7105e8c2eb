"""Hostile digests in every place: nothing outside the store is touched, and a good model stays whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_no_path_outside_the_store(memory: Path) -> None:
    """In a process of its own, because an audit hook cannot be taken off. A canary beside the store must stay unseen."""
    (memory / "canary").write_text("untouched")
    command = [sys.executable, "-m", "tests.store.hostile", str(memory / "models")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    result = json.loads(done.stdout)
    assert result["texts"] >= 60 and result["paths"] > 100
    assert result["outside"] == [] and result["whole"]
    assert (memory / "canary").read_text() == "untouched"
