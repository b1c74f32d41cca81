"""Accelerators: data-sheet figures, and the fraction that training reaches. Pure numbers, no torch."""

from __future__ import annotations

from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU and its share of the connections, as vendors state them: decimal units, one direction, no sparsity."""

    name: str
    memory_gib: float
    """What CUDA reports, which is a little less than the name says."""
    peak_tflops: float
    """Dense bf16 tensor-core peak in TFLOP/s."""
    memory_gb_s: float
    """Bandwidth of its own memory in GB/s."""
    nvlink_gb_s: float
    """To the other GPUs of its node in GB/s, one direction; PCIe's where there is no NVLink."""
    network_gb_s: float
    """Its share of the node's network in GB/s, one direction: the usual network of nodes with this GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="A100", memory_gib=79.2, peak_tflops=312.0, memory_gb_s=2039, nvlink_gb_s=300, network_gb_s=25),
        Gpu(name="A800", memory_gib=79.2, peak_tflops=312.0, memory_gb_s=2039, nvlink_gb_s=200, network_gb_s=12.5),
        Gpu(name="H100", memory_gib=79.1, peak_tflops=989.4, memory_gb_s=3350, nvlink_gb_s=450, network_gb_s=50),
        Gpu(name="H800", memory_gib=79.1, peak_tflops=989.4, memory_gb_s=3350, nvlink_gb_s=200, network_gb_s=50),
        Gpu(name="H200", memory_gib=139.8, peak_tflops=989.4, memory_gb_s=4800, nvlink_gb_s=450, network_gb_s=50),
        Gpu(name="H20", memory_gib=95.1, peak_tflops=148.0, memory_gb_s=4000, nvlink_gb_s=450, network_gb_s=50),
        Gpu(name="B200", memory_gib=178.3, peak_tflops=2250.0, memory_gb_s=8000, nvlink_gb_s=900, network_gb_s=50),
        Gpu(name="L40S", memory_gib=44.5, peak_tflops=362.05, memory_gb_s=864, nvlink_gb_s=32, network_gb_s=25),
    )
}
"""By name. Sources: NVIDIA's data sheets (A100 80GB SXM, H100 SXM5, H200 SXM, HGX B200, H20, L40S); A800 and H800 are
A100 and H100 with NVLink cut to 400 GB/s both ways. Network: one 200 Gb/s adapter (A100), half of one (A800 instances
of public clouds) or one 400 Gb/s adapter (H100 and newer) for each GPU, as in DGX and HGX systems."""


def gpu_named(name: str) -> Gpu | None:
    """The GPU of a device's name as people or CUDA write it (`h100`, `NVIDIA H100 80GB HBM3`); None if not known."""
    words = name.upper().replace("-", " ").split()
    return next((GPUS[word] for word in words if word in GPUS), None)
