"""Model FLOPs utilisation (MFU): the convention, and a device's peak.

Convention: FLOPs are those that the mathematics needs: 2 a multiply-add, a training step 3 times
its forward, causal attention at half the square, recomputation (remat) not counted, a frozen
teacher's forward counted once. MFU divides by the chip's dense bfloat16 peak, whatever the dtype.
"""

from typing import Any

import jax

from jaxreason.core.chips import PEAK_ALONE, chip_of_kind


def peak_flops(device: Any = None) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where it is not known (CPUs)."""
    kind = (device or jax.devices()[0]).device_kind
    if (chip := chip_of_kind(kind)) is not None:
        return chip.peak_bf16 / chip.devices
    return next((peak for name, peak in PEAK_ALONE.items() if kind.startswith(name)), None)
