"""tools/train.py whose ranks all get SIGKILL after STEP steps, independent of machine speed.

torchrun --nproc-per-node N tests/train/killed_after.py STEP CONFIG.yaml [dotted.key=value ...]
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from megatron_share4v.train import loop

    last, train_step = int(sys.argv.pop(1)), loop.train_step

    def train_step_or_kill(chunks: Any, optimizer: Any, data: Any, **options: Any) -> Any:
        if data.step > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(chunks, optimizer, data, **options)

    loop.train_step = train_step_or_kill
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
