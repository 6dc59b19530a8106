"""Data sheet values of GPUs, for predictions and MFU.

Rates are dense (without sparsity) and per GPU, links per direction.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in the server it is usually sold in."""

    name: str
    bf16: float
    """Peak of matrix products, FLOP/s."""
    fp8: float | None
    """Peak of FP8 matrix products, FLOP/s; None without FP8 tensor cores."""
    memory: float
    """Memory in bytes: as reported by the driver for H100 and H200, from the data sheet for others."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    link: float
    """Link bandwidth inside a server (NVLink; PCIe without it), bytes/s."""
    network: float = 50e9
    """Network bandwidth between servers, bytes/s: one 400 Gb/s port per GPU."""
    per_server: int = 8


# The more particular name first: "GB200" contains "B200".
GPUS = {
    "gb200": Gpu(name="GB200", bf16=2.5e15, fp8=5e15, memory=186e9, bandwidth=8e12, link=900e9, per_server=4),
    "b300": Gpu(name="B300", bf16=2.25e15, fp8=4.5e15, memory=270e9, bandwidth=8e12, link=900e9, network=100e9),
    "b200": Gpu(name="B200", bf16=2.25e15, fp8=4.5e15, memory=180e9, bandwidth=8e12, link=900e9),
    "h200": Gpu(name="H200", bf16=989e12, fp8=1979e12, memory=149e9, bandwidth=4.8e12, link=450e9),
    "h100": Gpu(name="H100", bf16=989e12, fp8=1979e12, memory=85e9, bandwidth=3.35e12, link=450e9),
    "h800": Gpu(name="H800", bf16=989e12, fp8=1979e12, memory=85e9, bandwidth=3.35e12, link=200e9),
    "h20": Gpu(name="H20", bf16=148e12, fp8=296e12, memory=102e9, bandwidth=4e12, link=450e9),
    "a800": Gpu(name="A800", bf16=312e12, fp8=None, memory=85e9, bandwidth=2e12, link=200e9, network=25e9),
    "a100": Gpu(name="A100", bf16=312e12, fp8=None, memory=85e9, bandwidth=2e12, link=300e9, network=25e9),
    "l40s": Gpu(name="L40S", bf16=362e12, fp8=733e12, memory=48e9, bandwidth=0.864e12, link=32e9, network=25e9),
}


def known_gpu(device_name: str) -> Gpu | None:
    """Return the GPU whose name is part of the device name; None for an unknown one, whose MFU is not reported."""
    words = device_name.upper().replace("-", " ").split()
    if "PCIE" in words or "NVL" in words:  # cards of the same name with fewer units, whose peak is another
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)
