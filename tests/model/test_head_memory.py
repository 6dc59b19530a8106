"""Memory and values of the head and its loss with a vocabulary of 152,064 rows, at one process and two tensor ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import run_world
from tiny import tiny_model
from tolerances import FP32_GRADIENT, FP32_MODULE

from megatron_share4v.config.parallel import ParallelConfig
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.mcore.layer_config import DTYPES
from megatron_share4v.model.chunks import build_chunks
from megatron_share4v.model.initialize import initialize_weights
from megatron_share4v.ops.backend import choose_ops_backend
from megatron_share4v.ops.op import Implementation
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.layout import Layout

VOCABULARY, LENGTH, SEQUENCES, ROWS = 152_064, 90, 2, 160
CASES = [
    (1, "native", "fp32"),
    (1, "native", "bf16"),
    (1, "reference", "bf16"),
    (2, "native", "fp32"),
    (2, "reference", "fp32"),
]


def head_step(implementation: Implementation, dtype: str, tensor: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the peak bytes of loss and gradients beside those gradients, and their values on this rank."""
    from tools.bench_ops import peak_bytes

    if implementation == "native":
        choose_ops_backend("native", device="cpu")
    model = tiny_model()
    language = replace(model.language, vocab_size=VOCABULARY - 5, hidden_size=16, num_layers=1)
    model, parallel = replace(model, language=language), ParallelConfig(tensor=tensor)
    with open_mesh(Layout(tensor=tensor), device=Device("cpu")) as mesh:
        [chunk] = build_chunks(model, mesh=mesh, parallel=parallel, dtype=DTYPES[dtype], ops=implementation)
        initialize_weights([chunk], seed=1, model=model)
        generator = torch.Generator().manual_seed(2)
        hidden = torch.randn(LENGTH, SEQUENCES, 16, generator=generator).to(DTYPES[dtype]).requires_grad_()
        rows = torch.randperm(LENGTH * SEQUENCES, generator=generator)[:ROWS]
        targets = torch.randint(0, VOCABULARY - 5, (ROWS,), generator=generator)
        leaves, found = (hidden, chunk.language.head.weight), []

        def step() -> None:
            loss = chunk.language.summed_loss(hidden, rows, targets)
            found[:] = [loss.detach(), *torch.autograd.grad(loss, leaves)]

        peak = peak_bytes(step, device="cpu") - sum(leaf.nbytes for leaf in leaves)
        logits = chunk.language.logits(hidden, rows)
        values = dict(zip(("loss", "hidden", "weight"), found))
        return peak, {**values, "unchunked": logits.detach(), "weights": leaves[1].detach(), "states": hidden.detach()}


@pytest.mark.parametrize(("tensor", "implementation", "dtype"), CASES)
def test_peak_is_under_an_eighth_of_the_logits(
    tensor: int, implementation: Implementation, dtype: str, native_ops: None
) -> None:
    """The values equal those of the unchunked form, here on all columns."""
    ranks = run_world(tensor, head_step, implementation, dtype, tensor)
    logits = ROWS * VOCABULARY // tensor * DTYPES[dtype].itemsize
    for peak, _ in ranks:
        assert peak < logits / 8, (peak, logits)
    if dtype == "bf16":
        return
    whole = torch.cat([values["unchunked"] for _, values in ranks], dim=1)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(LENGTH, SEQUENCES, 16, generator=generator)
    rows = torch.randperm(LENGTH * SEQUENCES, generator=generator)[:ROWS]
    targets = torch.randint(0, VOCABULARY - 5, (ROWS,), generator=generator)
    weight = torch.cat([values["weights"] for _, values in ranks]).requires_grad_()
    hidden.requires_grad_()
    flat = hidden.transpose(0, 1).flatten(0, 1)[rows]
    loss = torch.nn.functional.cross_entropy((flat @ weight.t())[:, : VOCABULARY - 5], targets, reduction="sum")
    loss.backward()
    assert whole[:, VOCABULARY - 5 :].isneginf().all()
    torch.testing.assert_close(whole[:, : VOCABULARY - 5], (flat @ weight.t()).detach()[:, : VOCABULARY - 5])
    for rank, (_, values) in enumerate(ranks):
        own = slice(VOCABULARY // tensor * rank, VOCABULARY // tensor * (rank + 1))
        assert abs(values["loss"] / loss - 1) <= FP32_MODULE
        for name, expected in (("hidden", hidden.grad), ("weight", weight.grad[own])):
            assert (values[name] - expected).abs().max() <= FP32_GRADIENT * expected.abs().max(), name
