"""AdamW as a torch Optimizer over the fused op; also replaces torch's inside Megatron's distributed optimizer."""

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
    """Tensors of one kernel call: one group, one device, one set of dtypes and one step count."""

    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    squares: list[torch.Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def split_tensors(self) -> Iterator[_Batch]:
        """Yield a batch for each tensor."""
        for weight, grad, mean, square, number in zip(self.weights, self.grads, self.means, self.squares, self.numbers):
            yield _Batch([weight], [grad], [mean], [square], [number])


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW as one fused op over all parameters, with torch's state names, step counts and checkpoints.

    `gradient_scale`: set before `step` to one fp32 on the parameters' device, e.g. `clip_coefficient`; gradients are
    multiplied by it as they are read, without a host sync, for one step. `seed`: parameters and squares in bf16 are
    rounded stochastically, reproducibly by seed, step and the parameter's index, or its attribute `rounding_number` if
    it has one; None: to nearest. `average_dtype`: dtype of moments created at the first step, fp32 or bf16. `on_host`:
    moments of GPU parameters are in pinned host memory; they are copied to the GPU, updated and copied back one
    parameter at a time. amsgrad, maximize, capturable, differentiable and sparse gradients raise OpsError.
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
            raise OpsError(f"FusedAdamW: averages in {average_dtype} were unsupported for; use float32 or bfloat16")
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
        """Return a FusedAdamW with the parameter groups and state objects of `optimizer`.

        `optimizer` must not be used afterwards.
        """
        defaults = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        # Not through the constructor: Megatron's groups hold views of weights, which it rejects as non-leaf tensors.
        new = cls(
            [torch.empty(0)],
            **defaults,
            average_dtype=average_dtype,
            seed=seed,
            on_host=on_host,
            implementation=implementation,
        )
        new.param_groups, new.state = optimizer.param_groups, optimizer.state
        new._move_step_counts_to_host()
        return new

    def _move_step_counts_to_host(self) -> None:
        """Move step counts to the host.

        torch's fused AdamW keeps them on the device, where reading one is a host sync; groups with `fused` would move
        them back.
        """
        for group in self.param_groups:
            group["fused"] = False
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].cpu()

    def state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        """Return the parameter's step count and moments, created if missing."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            placement: dict[str, Any] = (
                {"device": "cpu", "pin_memory": parameter.is_cuda} if self.on_host else {"device": parameter.device}
            )
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=self.average_dtype, **placement)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; return the result of `closure`, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self.gradient_scale = self.gradient_scale, None
        for group, count, batch in self._batches():
            beta1, beta2 = group["betas"]
            step = AdamWStep(float(group["lr"]), float(beta1), float(beta2), group["eps"], group["weight_decay"], count)
            for part in batch.split_tensors() if self.on_host else [batch]:
                self._update(part, step, scale)
        return loss

    def _update(self, batch: _Batch, step: AdamWStep, scale: torch.Tensor | None) -> None:
        """Update one batch.

        Moments on another device are copied to their weights' and back in stream order, without a sync.
        """
        on_device = [
            [moment.to(weight.device, non_blocking=True) for moment, weight in zip(moments, batch.weights)]
            for moments in (batch.means, batch.squares)
        ]
        adamw_(
            batch.weights,
            grads=batch.grads,
            means=on_device[0],
            squares=on_device[1],
            step=step,
            scale=scale,
            keys=() if self.seed is None else rounding_keys(seed=self.seed, step=step.number, numbers=batch.numbers),
            implementation=self.implementation,
        )
        for moment, moved in zip((*batch.means, *batch.squares), (*on_device[0], *on_device[1])):
            if moment is not moved:
                moment.copy_(moved, non_blocking=True)

    def _batches(self) -> Iterator[tuple[dict[str, Any], int, _Batch]]:
        """Advance the step counts; yield each group with a step count and the batch to update."""
        index = -1
        for group in self.param_groups:
            if unsupported := [name for name in UNSUPPORTED if group.get(name)]:
                raise OpsError(f"FusedAdamW has no {unsupported[0]}; leave it out or use torch.optim.AdamW")
            batches: dict[tuple, _Batch] = {}
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise OpsError(
                        "FusedAdamW takes dense gradients, got a sparse one; use torch.optim.SparseAdam for it"
                    )
                state = self.state_of(parameter)
                state["step"] += 1
                # Step counts are on the host, as torch keeps them: no sync.
                batch_key = (
                    int(state["step"]),
                    parameter.device,
                    parameter.dtype,
                    parameter.grad.dtype,
                    state["exp_avg"].dtype,
                )
                batch = batches.setdefault(batch_key, _Batch())
                batch.weights.append(parameter)
                batch.grads.append(parameter.grad.contiguous())
                batch.means.append(state["exp_avg"])
                batch.squares.append(state["exp_avg_sq"])
                batch.numbers.append(getattr(parameter, "rounding_number", index))
            yield from ((group, batch_key[0], batch) for batch_key, batch in batches.items())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the saved dtype of moments, which torch would convert to their parameter's."""
        super().load_state_dict(state_dict)
        self._move_step_counts_to_host()
        numbers = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(numbers, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                saved = state_dict["state"].get(index, {}).get(name)
                if saved is not None and saved.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = saved.to(self.state[parameter][name].device, copy=True)
