"""Image benchmark of tools/bench_data.py: equal pixels, and one JSON object as the last line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_measures_all_backends(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench_data.py", "--images", "128", "--rounds", "1"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "pil: bit-equal to CLIPImageProcessorPil on 64 images" in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])["images"]
    assert found["pil"]["max_error"] == 0 and found["torch_u8"]["max_error"] <= 2
    assert all(way["images_per_core_s"] > 0 for way in found.values())
