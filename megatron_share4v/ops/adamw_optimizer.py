"""AdamW as a torch Optimizer over the fused op: takes the place of torch's, also inside Megatron's distributed optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_share4v.errors import OpsError
from megatron_share4v.ops.adamw import AdamWStep, adamw_, rounding_keys
from megatron_share4v.ops.op import Implementation

UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


@dataclass
class _Batch:
    """What one call updates: tensors of one group, one device, one set of element types and one step count."""

    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    squares: list[torch.Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def one_by_one(self) -> Iterator[_Batch]:
        """A batch of each tensor."""
        for parts in zip(self.weights, self.grads, self.means, self.squares, self.numbers):
            yield _Batch(*([part] for part in parts))


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the update as one fused op over all parameters; state names, step counts and checkpoints are torch's.

    `gradient_scale`: set before `step` to one fp32 on the parameters' device, e.g. `clip_coefficient`; gradients are multiplied by it as they are
    read, and the host never reads it. It holds for one step. `seed`: parameters and squares in bf16 are rounded stochastically, reproducible
    by seed, step and the parameter's place; None: to nearest. `average_dtype`: of averages that are made at the first step, fp32 or bf16.
    `on_host`: averages of parameters on a GPU are made in pinned host memory; one parameter's at a time is brought over, updated and taken back.
    amsgrad, maximize, capturable and differentiable raise OpsError, and so do sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        average_dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        on_host: bool = False,
        implementation: Implementation,
    ) -> None:
        if average_dtype not in (torch.float32, torch.bfloat16):
            raise OpsError(f"FusedAdamW: averages in {average_dtype} were asked for; use float32 or bfloat16")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
        self.average_dtype, self.seed, self.on_host, self.implementation = average_dtype, seed, on_host, implementation
        self.gradient_scale: torch.Tensor | None = None

    @classmethod
    def in_place_of(
        cls,
        optimizer: torch.optim.AdamW,
        *,
        average_dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        on_host: bool = False,
        implementation: Implementation,
    ) -> FusedAdamW:
        """One with the very parameter groups and state of `optimizer`, which is not to be used any more."""
        defaults = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        # Not through the constructor: Megatron's groups hold views of weights, which it would refuse as no leaves of autograd's graph.
        new = cls(
            [torch.empty(0)],
            **defaults,
            average_dtype=average_dtype,
            seed=seed,
            on_host=on_host,
            implementation=implementation,
        )
        new.param_groups, new.state = optimizer.param_groups, optimizer.state
        new._keep_counts_on_the_host()
        return new

    def _keep_counts_on_the_host(self) -> None:
        """torch's fused form has them on the device, where reading one would wait for it; groups that say `fused` would put them there again."""
        for group in self.param_groups:
            group["fused"] = False
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].cpu()

    def state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The parameter's step count and averages, made where there are none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            place: dict[str, Any] = (
                {"device": "cpu", "pin_memory": parameter.is_cuda} if self.on_host else {"device": parameter.device}
            )
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=self.average_dtype, **place)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, if any, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self.gradient_scale = self.gradient_scale, None
        for group, count, batch in self._batches():
            beta1, beta2 = group["betas"]
            step = AdamWStep(float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], count)
            for part in batch.one_by_one() if self.on_host else [batch]:
                self._update(part, step, scale)
        return loss

    def _update(self, batch: _Batch, step: AdamWStep, scale: torch.Tensor | None) -> None:
        """Averages that lie elsewhere than their weights are copied there and back, in the stream's order: nothing waits."""
        there = [
            [average.to(weight.device, non_blocking=True) for average, weight in zip(kept, batch.weights)]
            for kept in (batch.means, batch.squares)
        ]
        adamw_(
            batch.weights,
            grads=batch.grads,
            means=there[0],
            squares=there[1],
            step=step,
            scale=scale,
            keys=() if self.seed is None else rounding_keys(seed=self.seed, step=step.number, numbers=batch.numbers),
            implementation=self.implementation,
        )
        for kept, moved in zip((*batch.means, *batch.squares), (*there[0], *there[1])):
            if kept is not moved:
                kept.copy_(moved, non_blocking=True)

    def _batches(self) -> Iterator[tuple[dict[str, Any], int, _Batch]]:
        """Counts one step on and yields what has to be updated with which count."""
        number = -1
        for group in self.param_groups:
            if asked := [name for name in UNSUPPORTED if group.get(name)]:
                raise OpsError(f"FusedAdamW has no {asked[0]}; leave it out or use torch.optim.AdamW")
            batches: dict[tuple, _Batch] = {}
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise OpsError(
                        "FusedAdamW takes dense gradients, got a sparse one; use torch.optim.SparseAdam for it"
                    )
                state = self.state_of(parameter)
                state["step"] += 1
                # Counts live on the host, as torch keeps them: reading one waits for nothing.
                kind = (
                    int(state["step"]),
                    parameter.device,
                    parameter.dtype,
                    parameter.grad.dtype,
                    state["exp_avg"].dtype,
                )
                batch = batches.setdefault(kind, _Batch())
                batch.weights.append(parameter)
                batch.grads.append(parameter.grad.contiguous())
                batch.means.append(state["exp_avg"])
                batch.squares.append(state["exp_avg_sq"])
                batch.numbers.append(number)
            yield from ((group, kind[0], batch) for kind, batch in batches.items())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but averages keep the type in which they were saved, where torch would give them their parameter's."""
        super().load_state_dict(state_dict)
        self._keep_counts_on_the_host()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                saved = state_dict["state"].get(number, {}).get(name)
                if saved is not None and saved.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = saved.to(self.state[parameter][name].device, copy=True)
