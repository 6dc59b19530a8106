"""Registry of benchmarks by name.

short_answer   vqav2 gqa vizwiz textvqa
yes_no         mme pope
choices        science_qa seed qbench
mmbench        mmbench mmbench_cn
judged         llava_bench mm_vet
custom         custom: your own questions in the official format
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from megatron_share4v.errors import ConfigError
from megatron_share4v.evaluate.task import Task
from megatron_share4v.evaluate.tasks import choices, custom, judged, mmbench, short_answer, yes_no

TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for group in (short_answer, yes_no, choices, mmbench, judged, custom) for task in group.TASKS}
)


def get_task(name: str) -> Task:
    """Return the benchmark `name`, with "-" or "_". Raises ConfigError naming the nearest match when it is unknown."""
    known = name.replace("-", "_").lower()
    if known not in TASKS:
        [nearest] = difflib.get_close_matches(known, TASKS, n=1, cutoff=0.0)
        raise ConfigError(
            f"--benchmark {name}: there is no such benchmark; the nearest is {nearest}. Choose one of "
            f"{', '.join(TASKS)}"
        )
    return TASKS[known]
