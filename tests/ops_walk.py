"""Check every op's cases: values, gradients, unchanged inputs, torch's own checks. As a program, with another library:

python tests/ops_walk.py LIBRARY [SEED]   the emulated CUDA kernels under AddressSanitizer, or the C++-only library
python tests/ops_walk.py --cuda           the CUDA kernels on this machine's GPU, against references on its CPU
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from megatron_share4v.ops.backend import choose_ops_backend, load_library
from megatron_share4v.ops.op import NAMESPACE, Implementation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: tools/ is no installed package
from tools.op_cases import OPS
from tools.op_cases.record import Case, OpCases

Tensors = list[torch.Tensor]
QUICK_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def poison_empty_memory() -> None:
    """Make torch.empty return NaN, so that outputs which no kernel wrote are found."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


def call(
    op: OpCases, case: Case, implementation: Implementation, *, wide: bool = False, device: str = "cpu"
) -> tuple[Tensors, Tensors]:
    """Return (outputs, gradients of the differentiable arguments) of one case, on the CPU.

    `wide`: all floating-point arguments in fp64.
    """

    def prepared(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = _moved(value.detach(), device)
        return value.double() if wide and value.is_floating_point() else value

    arguments = {name: prepared(value) for name, value in case.arguments.items()}
    leaves = [
        arguments[name].requires_grad_() for name in op.differentiable if isinstance(arguments.get(name), torch.Tensor)
    ]
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    outputs = op.function(**arguments, implementation=implementation)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    gradients: Tensors = []
    if leaves:
        generator = torch.Generator().manual_seed(7)
        slopes = [
            torch.randn(output.shape, generator=generator).to(case.dtype).to(output.dtype).to(device)
            for output in outputs
        ]
        gradients = list(torch.autograd.grad(outputs, leaves, slopes))
    for name, value in kept.items():
        assert torch.equal(value, arguments[name]), f"{op.name} changed its input {name}"
        arguments[name].requires_grad_(False)
    return [output.detach().cpu() for output in outputs], [gradient.cpu() for gradient in gradients]


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Move with strides and storage offset: `.to` would pack strided and misaligned tensors."""
    if device == "cpu":
        return tensor
    size = (
        sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    )
    whole = tensor.as_strided((tensor.storage_offset() + size,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def check(op: OpCases, case: Case, implementation: Implementation, *, device: str = "cpu") -> None:
    """Compare outputs and gradients with the reference in fp64 on the CPU, from the same inputs."""
    tolerance = op.tolerances[case.dtype]
    truths, slopes = call(op, case, "reference", wide=True)
    outputs, gradients = call(op, case, implementation, device=device)
    names = [
        *(f"output {i}" for i in range(len(outputs))),
        *(f"gradient of {name}" for name in op.differentiable if name in case.arguments),
    ]
    for name, got, truth in zip(names, outputs + gradients, truths + slopes, strict=True):
        where = f"{op.name} [{case.name}] {implementation}: {name}"
        assert got.shape == truth.shape, f"{where} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        assert not got.is_floating_point() or got.dtype in (case.dtype, torch.float32), f"{where} is {got.dtype}"
        if truth.numel():
            # `not <=` rather than `>`: NaN is different from everything.
            difference, limit = (
                (got.double() - truth).abs().max().item(),
                tolerance.limit * max(truth.abs().max().item(), tolerance.floor),
            )
            assert difference <= limit, (
                f"{where} differs by {difference:.3g}, accepted {limit:.3g} ({tolerance.reason})"
            )


class Recorder(TorchDispatchMode):
    """Record every call of one of our ops, forward or backward, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == NAMESPACE:
            assert not kwargs, f"{function} is called by keyword; by position, opcheck can repeat it"
            self.calls.append(
                (
                    function,
                    tree_map(lambda value: value.detach().clone() if isinstance(value, torch.Tensor) else value, args),
                )
            )
        return function(*args, **(kwargs or {}))


def check_registration(op: OpCases, case: Case, *, thorough: bool) -> int:
    """Run torch.library.opcheck for every op that the case calls; return their number.

    `thorough` also traces them through AOTAutograd.
    """
    with Recorder() as recorder:
        call(op, case, "native")
    for function, args in recorder.calls:
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "Autograd"):
            args = tree_map(
                lambda value: (
                    value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                ),
                args,
            )
        checks = (*QUICK_CHECKS, "test_aot_dispatch_dynamic") if thorough else QUICK_CHECKS
        torch.library.opcheck(function, args, test_utils=checks)
    return len(recorder.calls)


def main() -> int:
    """Check all cases with the library named on the command line, or on the GPU."""
    device = "cuda" if sys.argv[1] == "--cuda" else "cpu"
    library = choose_ops_backend("native", device=device).library if device == "cuda" else Path(sys.argv[1])
    load_library(library)
    if len(sys.argv) > 2:
        ctypes.CDLL(str(library)).share4v_emulate_seed(int(sys.argv[2]))
    poison_empty_memory()
    walked = 0
    for op in OPS:
        for case in op.cases():
            check(op, case, "native", device=device)
            walked += 1
    print(f"{walked} cases on {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
