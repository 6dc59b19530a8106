"""Interface to megatron-core: version check, CPU patch, groups, layer specs, optimizer, schedule.

This is the only package that imports megatron-core. Importing it patches torch.cuda (mcore/cpu_patch.py) where there is
no CUDA, and must precede any import of megatron.core. Other packages import megatron-core's classes from this package.
"""

from importlib.metadata import version
from importlib.util import find_spec

import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.mcore import cpu_patch
from megatron_share4v.upstream_warnings import route_warnings

SUPPORTED = ("0.16.1",)


def _check_environment() -> None:
    """Raise OpsError for installations in which megatron-core would fail late or silently."""
    found = version("megatron-core")
    if found not in SUPPORTED:
        raise OpsError(
            f"megatron-core {found} is installed; this version works with {' or '.join(SUPPORTED)}: "
            f"pip install megatron-core=={SUPPORTED[-1]}"
        )
    if find_spec("apex") is not None and find_spec("apex.multi_tensor_apply") is None:
        raise OpsError(
            "the installed package 'apex' is not NVIDIA's and would be mistaken for it by megatron-core; "
            "pip uninstall apex"
        )
    # Without psutil the writer processes of dist_checkpointing die and a save hangs.
    if find_spec("psutil") is None:
        raise OpsError("psutil is missing: saving a checkpoint would hang; pip install psutil")


_check_environment()
route_warnings(cuda=torch.cuda.is_available())
cpu_patch.patch_cuda_for_cpu()
