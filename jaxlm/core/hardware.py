"""Peak figures of accelerators, in one table with its sources.

Figures are for one device as JAX counts devices. Where a chip of two cores is two devices (TPU v2 and v3, and v4 for
the ahead-of-time compiler) they are half of the figures of the chip.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "chip_of"]


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        name: as in a topology, ``v5e:16x16``; "" if no topology names it.
        kind: a part of JAX's ``device_kind``.
        flops: dense bfloat16 FLOP/s (float16 on V100 and T4).
        source: where the figures are from.
        int8: dense int8 operations a second; 0: as ``flops``.
        memory: bytes; 0: not needed here.
        bandwidth: bytes a second from and to memory.
        link: bytes a second to one neighbour, in one direction.
        dimensions: the dimensions of the torus of links.
        wraps: a dimension whose extent is a multiple of this closes to a ring.
        dcn: bytes a second of the data centre network, in one direction.
    """

    name: str
    kind: str
    flops: float
    source: str
    int8: float = 0.0
    memory: int = 0
    bandwidth: float = 0.0
    link: float = 0.0
    dimensions: int = 0
    wraps: int = 0
    dcn: float = 0.0


_GIB = 2**30
_CLOUD = "cloud.google.com/tpu/docs"
_SHEET = "the vendor's data sheet"

# The first chip whose ``kind`` is a part of the device's kind counts. The rate of a link is the chip's total for both
# directions, divided by twice its ports. Dimensions close where the documentation of the generation says so (v5e, v6e:
# 16; v4, v5p: cubes of 4 x 4 x 4). ``dcn`` is the documented figure of a pod, or of a host, divided by its chips.
CHIPS = (
    Chip("v5e", "TPU v5 lite", 197e12, f"{_CLOUD}/v5e", 393e12, 16 * _GIB, 819e9, 50e9, 2, 16, 3.125e9),
    Chip("v5p", "TPU v5", 459e12, f"{_CLOUD}/v5p", 918e12, 95 * _GIB, 2765e9, 100e9, 3, 4, 6.25e9),
    Chip("v6e", "TPU v6 lite", 918e12, f"{_CLOUD}/v6e", 1836e12, 32 * _GIB, 1638e9, 100e9, 2, 16, 12.5e9),
    Chip("v4", "TPU v4", 275e12, f"{_CLOUD}/v4; arXiv:2304.01433, table 4", 275e12, 32 * _GIB, 1200e9, 50e9, 3, 4,
         3.125e9),
    Chip("", "TPU v3", 61.5e12, f"{_CLOUD}/v3"),
    Chip("", "TPU v2", 22.5e12, f"{_CLOUD}/v2"),
    Chip("", "B200", 2250e12, _SHEET),
    Chip("", "H200", 989e12, _SHEET),
    Chip("", "H100 PCIe", 756e12, _SHEET),
    Chip("", "H100 NVL", 835e12, _SHEET),
    Chip("", "H100", 989e12, _SHEET),
    Chip("", "A100", 312e12, _SHEET),
    Chip("", "L40S", 362e12, _SHEET),
    Chip("", "L4", 121e12, _SHEET),
    Chip("", "A10G", 70e12, _SHEET),
    Chip("", "V100", 125e12, _SHEET),
    Chip("", "T4", 65e12, _SHEET),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this ``device_kind``; None for a CPU or an unknown chip."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)
