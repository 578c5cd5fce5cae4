"""Accelerator chips: peak rates, memory and links, each from its maker's page; and their names.

Rates are peaks: nothing runs faster, most things run slower. Bandwidths are in bytes a second and
one way, so that a ring's two directions count as two links.
"""

import dataclasses
import re

from jaxreason.core.errors import UserError, nearest

GIB = 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can do at most, and how it is wired to the others.

    `peak_bf16` dense FLOP/s; `hbm` bytes; `hbm_bandwidth` bytes/s. `links` to its neighbours, each
    of `link_bandwidth` bytes/s one way; a TPU's torus has `dimensions`, and a dimension closes into
    a ring from `ring_from` chips on; a GPU's links all lead to one switch. `network` is the chip's
    share of what leaves the slice or the node, bytes/s one way. `kinds` are prefixes of JAX's
    `device_kind`; `host` chips to a host (TPU), GPUs to a node; `devices` that JAX sees in a chip.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    peak_bf16: float
    hbm: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    network: float
    source: str
    dimensions: int = 0
    ring_from: int = 0
    host: int = 8
    devices: int = 1


def _tpu(
    name, kinds, tflops, gib, gbps, bidirectional, dims, ring, network_gbit, page, host=4, devices=1
):
    """A TPU as its page has it: ICI in GB/s a chip over all links and both directions."""
    links = 2 * dims
    return Chip(
        name=name, platform="tpu", kinds=kinds, peak_bf16=tflops * 1e12, hbm=gib * GIB,
        hbm_bandwidth=gbps * 1e9, links=links, link_bandwidth=bidirectional * 1e9 / 2 / links,
        network=network_gbit / 8 * 1e9, dimensions=dims, ring_from=ring, host=host, devices=devices,
        source=_TPU + page,
    )  # fmt: skip


def _gpu(name, kinds, tflops, gb, tbps, nvlink, network_gbit, page):
    """A GPU as its page has it: NVLink in GB/s over both directions; one NIC a GPU in DGX nodes."""
    return Chip(
        name=name, platform="gpu", kinds=kinds, peak_bf16=tflops * 1e12, hbm=gb * 1e9,
        hbm_bandwidth=tbps * 1e12, links=1, link_bandwidth=nvlink * 1e9 / 2,
        network=network_gbit / 8 * 1e9, source=_NVIDIA + page,
    )  # fmt: skip


# Order matters where one kind is a prefix of another.
CHIPS = (
    # v4's page gives ICI as 2400 Gbit/s one way; the later pages count both directions.
    _tpu("v4", ("TPU v4",), 275, 32, 1228, 600, 3, 4, 25, "v4"),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 400, 2, 16, 25, "v5e", host=8),
    _tpu("v5p", ("TPU v5p", "TPU v5"), 459, 95, 2765, 1200, 3, 4, 50, "v5p"),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1638, 800, 2, 16, 100, "v6e", host=8),
    _tpu("v7x", ("TPU v7", "TPU7x"), 2307, 192, 7380, 1200, 3, 4, 100, "tpu7x", devices=2),
    _gpu("a100-40g", ("NVIDIA A100-SXM4-40GB",), 312, 40, 1.555, 600, 200, "a100/"),
    _gpu("a100", ("NVIDIA A100",), 312, 80, 2.039, 600, 200, "a100/"),
    # The PCIe card's figures are those of NVIDIA's H100 data sheet; 3 NVLink bridges.
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 756, 80, 2.0, 600, 400, "h100/"),
    _gpu("h100", ("NVIDIA H100",), 989, 80, 3.35, 900, 400, "h100/"),
    _gpu("h200", ("NVIDIA H200",), 989, 141, 4.8, 900, 400, "h200/"),
    _gpu("b200", ("NVIDIA B200",), 2250, 180, 8.0, 1800, 400, "dgx-b200/"),
)
NAMES = {chip.name: chip for chip in CHIPS}
# Chips that train here without a place in a mesh of many: peak dense bfloat16 FLOP/s alone.
PEAK_ALONE = {
    "TPU v3": 123e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for: a chip and its arrangement, `shape` of a torus or (GPUs,)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.chip.platform}:{self.chip.name}:{'x'.join(map(str, self.shape))}"


def chip_of_kind(kind: str) -> Chip | None:
    """The chip of a JAX `device_kind`; None where the table has none."""
    return next((c for c in CHIPS if any(kind.startswith(k) for k in c.kinds)), None)


def parse_target(text: str) -> Target:
    """`tpu:v5p:4x4x4` or `gpu:h100:8`.

    Raises:
      UserError: unknown platform or chip (the nearest is named), or a shape that the chip has not.
    """
    platform, *rest = text.split(":")
    example = {"tpu": "tpu:v5p:4x4x4", "gpu": "gpu:h100:8"}
    if platform not in example:
        raise UserError(
            f"--compile_for={text}: platform {platform!r}{nearest(platform, example)}; expected "
            f"{' or '.join(example.values())}"
        )
    known = [chip.name for chip in CHIPS if chip.platform == platform]
    if len(rest) != 2 or rest[0] not in known:
        got = (
            f"chip {rest[0]!r}{nearest(rest[0], known)}; " if rest and rest[0] not in known else ""
        )
        raise UserError(
            f"--compile_for={text}: {got}expected {platform}:CHIP:SHAPE as in {example[platform]}; "
            f"chips: {', '.join(known)}"
        )
    chip = NAMES[rest[0]]
    dims = chip.dimensions or 1
    shape = re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (dims - 1), rest[1])
    if shape is None:
        form = "x".join("ABC"[:dims]) if dims > 1 else "N, the number of GPUs"
        raise UserError(
            f"--compile_for={text}: shape {rest[1]!r}; {chip.name} takes {form}, as in "
            f"{platform}:{chip.name}:{'x'.join(['4'] * dims) if dims > 1 else 8}"
        )
    numbers = tuple(int(n) for n in rest[1].split("x"))
    if platform == "gpu" and numbers[0] > chip.host and numbers[0] % chip.host:
        raise UserError(
            f"--compile_for={text}: {numbers[0]} GPUs are no whole nodes of {chip.host}; use "
            f"{-(-numbers[0] // chip.host) * chip.host}"
        )
    return Target(chip, numbers)
