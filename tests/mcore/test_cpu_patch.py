"""CPU patch: megatron-core's calls into torch.cuda get replacements, and other callers do not.

touchpoints.tsv has each patched call, with the file and function of megatron-core that makes it (without core's
inference engines, which are not used); the tests fail when upstream moves one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_share4v.mcore import cpu_patch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where there is CUDA")

INSIDE, OUTSIDE = "megatron.core.x", "somebody.else"
TOUCHES = [tuple(line.split("\t")) for line in (Path(__file__).parent / "touchpoints.tsv").read_text().splitlines()]
# Patched call -> an expression that makes it, and one that is true of the result `a`.
ANSWERS = {
    "_lazy_call": ("torch.cuda._lazy_call(lambda: None)", "a is None"),
    "cuda": ("torch.zeros(2).cuda()", "a.device.type == 'cpu'"),
    "current_device": ("torch.cuda.current_device()", "a == torch.device('cpu')"),
    "device='cuda' literal": ("torch.tensor([1.0], device='cuda')", "a.device.type == 'cpu' and a.item() == 1.0"),
    "get_rng_state": ("torch.cuda.get_rng_state()", "torch.equal(a, torch.get_rng_state())"),
    "manual_seed": (
        "(torch.cuda.manual_seed(5), torch.rand(1))[1]",
        "torch.manual_seed(5).initial_seed() == 5 and torch.equal(a, torch.rand(1))",
    ),
    "pin_memory=True": ("torch.zeros(2, device='cpu', pin_memory=True)", "a.shape == (2,)"),
    "synchronize": ("torch.cuda.synchronize()", "a is None"),
    "type": ("torch.zeros(2).type()", "a == 'torch.cuda.FloatTensor'"),
}
NOT_LISTED = {
    "to": ("torch.zeros(2).to('cuda', torch.float64)", "a.device.type == 'cpu' and a.dtype is torch.float64"),
    "to by keyword": ("torch.zeros(2).to(device=torch.device('cuda', 0))", "a.device.type == 'cpu'"),
    "module": ("torch.nn.Linear(1, 1).cuda()", "next(a.parameters()).device.type == 'cpu'"),
    "factory": (
        "torch.empty((2, 3), device=torch.device('cuda'), dtype=torch.int8)",
        "a.shape == (2, 3) and a.dtype is torch.int8",
    ),
    "stream": ("torch.cuda.current_stream().wait_stream(torch.cuda.Stream())", "a is None"),
    "compile": ("torch.compile(len)", "a is len"),
    "compile with options": ("torch.compile(dynamic=True)(len)", "a is len"),
    "set_rng_state": ("torch.cuda.set_rng_state(torch.get_rng_state())", "a is None"),
}
# Stock torch without CUDA accepts the others and fails, if at all, at a later call.
REFUSED_WITHOUT_CUDA = (
    "cuda", "current_device", "device='cuda' literal", "get_rng_state", "pin_memory=True", "synchronize", "to",
    "to by keyword", "module", "factory",
)  # fmt: skip


def _evaluate(expression: str, *, caller: str):
    return eval(expression, {"torch": torch, "__name__": caller})


@pytest.mark.parametrize(
    ("expression", "truth"), [*ANSWERS.values(), *NOT_LISTED.values()], ids=[*ANSWERS, *NOT_LISTED]
)
def test_megatron_core_gets_replacements(expression: str, truth: str) -> None:
    assert eval(truth, {"torch": torch, "a": _evaluate(expression, caller=INSIDE)})


@pytest.mark.parametrize("touch", REFUSED_WITHOUT_CUDA)
def test_other_callers_get_torchs_errors(touch: str) -> None:
    expression, _ = (ANSWERS | NOT_LISTED)[touch]
    with pytest.raises((AssertionError, RuntimeError)):
        _evaluate(expression, caller=OUTSIDE)


def test_other_callers_see_cpu_tensor_types() -> None:
    assert _evaluate("torch.zeros(2).type()", caller=OUTSIDE) == "torch.FloatTensor"
    assert _evaluate("torch.zeros(2).type(torch.float64).dtype", caller=INSIDE) is torch.float64


def test_seeding_by_other_callers_leaves_the_cpu_generator() -> None:
    before = torch.get_rng_state()
    _evaluate("torch.cuda.manual_seed(5)", caller=OUTSIDE)
    assert torch.equal(torch.get_rng_state(), before)


def test_events_can_time() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    sum(range(10_000))
    end.record()
    assert 0 < start.elapsed_time(end) < 1000 and end.query()


def test_device_contexts_still_work() -> None:
    with torch.device("meta"):
        assert all(
            tensor.is_meta
            for tensor in (
                torch.empty(2),
                torch.zeros(2),
                torch.tensor([1.0]),
                torch.arange(3),
                torch.nn.Linear(2, 2).weight,
            )
        )


def test_patching_twice_changes_nothing() -> None:
    before = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")} | {
        "current": torch.cuda.current_device,
        "to": torch.Tensor.to,
    }
    assert cpu_patch.patch_cuda_for_cpu()
    after = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")} | {
        "current": torch.cuda.current_device,
        "to": torch.Tensor.to,
    }
    assert before == after


def test_torchs_compiler_is_not_loaded() -> None:
    """Loading it would take a third of every start; also shows that nothing on the way compiles."""
    script = (
        "import sys, megatron_share4v.train.loop; "
        "print(*{'torch._dynamo', 'torch._inductor'} & set(sys.modules), 'torch' in sys.modules)"
    )
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert finished.stdout.split() == ["True"]


def test_patching_too_late_raises() -> None:
    script = (
        "import sys, types; sys.modules['megatron.core.x'] = types.ModuleType('megatron.core.x'); "
        "import megatron_share4v.mcore"
    )
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode != 0
    assert "torch.cuda must be patched before megatron.core is imported" in finished.stderr


def test_every_kind_of_touchpoint_has_a_test() -> None:
    assert {what for what, _ in TOUCHES} <= set(ANSWERS)


@pytest.mark.parametrize(("what", "where"), TOUCHES)
def test_upstream_still_has_the_touchpoint(what: str, where: str) -> None:
    file, function = where.split(":")
    path = Path(find_spec("megatron.core").submodule_search_locations[0]) / file
    assert path.exists(), f"megatron-core has no {file} any more; its use of {what} has moved: update touchpoints.tsv"
    bodies = list(_bodies(ast.parse(path.read_text()), function))
    assert bodies, f"{file} has no function {function} any more; its use of {what} has moved: update touchpoints.tsv"
    assert any(_touches(body, what) for body in bodies), (
        f"{where} does not use {what} any more: remove the line from touchpoints.tsv"
    )


def _bodies(tree: ast.AST, function: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if (function == "<listcomp>" and isinstance(node, ast.ListComp)) or getattr(node, "name", None) == function:
            yield node


def _touches(body: ast.AST, what: str) -> bool:
    if "=" not in what:
        return any(what in (getattr(node, "attr", None), getattr(node, "id", None)) for node in ast.walk(body))
    keyword, value = what.removesuffix(" literal").split("=")
    return any(
        isinstance(node, ast.keyword)
        and node.arg == keyword
        and isinstance(node.value, ast.Constant)
        and node.value.value == ast.literal_eval(value)
        for node in ast.walk(body)
    )
