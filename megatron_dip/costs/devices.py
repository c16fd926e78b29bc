"""GPUs: published rates, and how much of them work of a given size achieves.

Time of one kernel is the larger of two: its operations over the rate achieved, and its bytes over
the memory bandwidth.  The rate achieved grows with the size of the kernel,
``efficiency(flops) = best * flops / (flops + half_rate_flops)``, which is the same as a constant
start-up time per kernel beside a constant rate: so times of items stay additive, and the start-up
goes into what a layer costs per call.

``best`` and ``half_rate_flops`` are assumptions, good for proportions; a profile measures instead.
Neither clocks that fall under load nor contention between computing and transfers is modelled.
"""

import math
from dataclasses import dataclass, replace

from megatron_dip.errors import ConfigError, shown

__all__ = ["Device", "device_preset"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one GPU and of its links, bytes and operations per microsecond."""

    name: str
    peak_flops_per_us: float
    """Dense, bf16."""
    memory_bytes: int
    memory_bytes_per_us: float
    nvlink_bytes_per_us: float
    """In one direction: half of the published total."""
    network_bytes_per_us: float
    """One GPU's share of the node's network, in one direction."""
    best_efficiency: float
    """Share of the peak that the largest kernels achieve."""
    half_rate_flops: float
    """Size of a kernel that achieves half of the best; 0: a constant rate."""
    layer_overhead_us: float = 40.0
    """Launching the kernels of one layer once."""
    collective_latency_us: float = 8.0
    """Start of one collective; 0 where collectives are not counted."""
    link_efficiency: float = 0.8
    """Share of a link's published rate that transfers and collectives achieve."""

    def efficiency(self, flops: float) -> float:
        """Share of the peak that a kernel of ``flops`` operations achieves."""
        if flops <= 0:
            return 0.0
        return self.best_efficiency * flops / (flops + self.half_rate_flops)

    def kernel_us(self, flops: float, num_bytes: float) -> float:
        """Time of one kernel, start-up included."""
        memory_us = num_bytes / self.memory_bytes_per_us
        if flops <= 0:
            return memory_us
        return max(flops / (self.peak_flops_per_us * self.efficiency(flops)), memory_us)

    def item_us(self, flops: float, num_bytes: float) -> float:
        """What one item adds to a kernel that is under way: the time without start-up."""
        compute_us = flops / (self.peak_flops_per_us * self.best_efficiency)
        return max(compute_us, num_bytes / self.memory_bytes_per_us)

    def start_us(self) -> float:
        """Start-up of one kernel that computes."""
        return self.half_rate_flops / (self.peak_flops_per_us * self.best_efficiency)

    def with_constant_rate(self, efficiency: float) -> "Device":
        """The same device, with the same share of its peak achieved at every size."""
        return replace(self, best_efficiency=efficiency, half_rate_flops=0.0)

    def with_layer_overhead(self, layer_overhead_us: float) -> "Device":
        """The same device, where calling a layer costs ``layer_overhead_us``."""
        return replace(self, layer_overhead_us=layer_overhead_us)

    def without_memory_traffic(self) -> "Device":
        """The same device, where only operations take time."""
        return replace(self, memory_bytes_per_us=math.inf)

    def without_collectives(self) -> "Device":
        """The same device, where collectives start at no cost."""
        return replace(self, collective_latency_us=0.0)


def _hopper(name: str, memory_gb: int, memory_tb_per_s: float, nvlink_gb_per_s: float) -> Device:
    return Device(
        name=name,
        peak_flops_per_us=989.0e6,
        memory_bytes=memory_gb * 10**9,
        memory_bytes_per_us=memory_tb_per_s * 1e6,
        nvlink_bytes_per_us=nvlink_gb_per_s * 1e3 / 2,
        network_bytes_per_us=50.0e3,
        best_efficiency=0.7,
        half_rate_flops=2.0e9,
    )


def device_preset(name: str) -> Device:
    """A GPU by name: A100, H100, H200 or H800.

    Sources (vendor's data sheets; rates without sparsity):

    - A100 80 GB SXM, "NVIDIA A100 Tensor Core GPU" data sheet: bf16 312 TFLOPS, 2039 GB/s,
      NVLink 600 GB/s; DGX A100: 200 Gb/s of network per GPU.
    - H100 SXM, "NVIDIA H100 Tensor Core GPU" data sheet: bf16 1979 TFLOPS with sparsity, which is
      989 dense; 80 GB, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 400 Gb/s of network per GPU.
    - H200 SXM, "NVIDIA H200 Tensor Core GPU" data sheet: as H100 but 141 GB, 4.8 TB/s.
    - H800 SXM: as H100 but NVLink 400 GB/s, as stated for their machines in the DeepSeek-V3
      hardware report (arXiv 2505.09343).

    Raises:
        ConfigError: No such preset.
    """
    presets = (
        Device(
            name="A100",
            peak_flops_per_us=312.0e6,
            memory_bytes=80 * 10**9,
            memory_bytes_per_us=2.039e6,
            nvlink_bytes_per_us=300.0e3,
            network_bytes_per_us=25.0e3,
            best_efficiency=0.8,
            half_rate_flops=1.0e9,
        ),
        _hopper("H100", 80, 3.35, 900.0),
        _hopper("H200", 141, 4.8, 900.0),
        _hopper("H800", 80, 3.35, 400.0),
    )
    for device in presets:
        if device.name == name:
            return device
    raise ConfigError(
        f"gpu: no preset {shown(name)} (expected one of {[device.name for device in presets]})"
    )
