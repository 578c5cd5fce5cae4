"""Peak rates of chips, and model FLOPs utilisation (MFU).

Convention: FLOPs are those that the mathematics needs: 2 a multiply-add, a training step 3 times
its forward, causal attention at half the square, recomputation (remat) not counted, a frozen
teacher's forward counted once. MFU divides by the chip's dense bfloat16 peak, whatever the dtype.
"""

from typing import Any

import jax

# Dense bfloat16 FLOP/s a chip, from the makers' data sheets; matched as prefixes of device_kind.
PEAK_BF16 = {
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


def peak_flops(device: Any = None) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where it is not known (CPUs)."""
    kind = (device or jax.devices()[0]).device_kind
    for name, peak in PEAK_BF16.items():
        if kind.startswith(name):
            return peak
    return None
