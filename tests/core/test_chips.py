"""The chip table, its names on the command line, and the peaks that MFU divides by."""

import types

import pytest

from jaxreason.core import chips, flops
from jaxreason.core.errors import UserError


def test_every_chip_has_plausible_rates_and_a_source_of_its_maker():
    for chip in chips.CHIPS:
        # FLOPs a byte of memory: all of these lie between 150 and 600.
        assert 150 < chip.peak_bf16 / chip.hbm_bandwidth < 600, chip
        assert 16e9 <= chip.hbm <= 300e9 and 1e9 < chip.network < chip.link_bandwidth * chip.links
        maker = "docs.cloud.google.com/tpu" if chip.platform == "tpu" else "www.nvidia.com"
        assert maker in chip.source
    assert len(chips.NAMES) == len(chips.CHIPS)


def test_links_are_one_way_and_a_sixth_or_a_quarter_of_the_chips():
    v5e, v5p = chips.NAMES["v5e"], chips.NAMES["v5p"]
    assert (v5e.links, v5e.link_bandwidth) == (4, 50e9)
    assert (v5p.links, v5p.link_bandwidth) == (6, 100e9)
    assert chips.NAMES["h100"].link_bandwidth == 450e9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)
def test_a_device_is_found_by_its_kind(kind, name):
    chip = chips.chip_of_kind(kind)
    assert chip is not None and chip.name == name
    assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == chip.peak_bf16


def test_peaks_of_chips_without_a_mesh_and_of_none():
    assert flops.peak_flops(types.SimpleNamespace(device_kind="Tesla T4")) == 65e12
    assert flops.peak_flops(types.SimpleNamespace(device_kind="cpu")) is None
    # Two devices a chip: MFU divides by the peak of all devices together.
    assert flops.peak_flops(types.SimpleNamespace(device_kind="TPU7x")) == 2307e12 / 2


def test_a_target_is_read_and_written_back():
    for text in ("tpu:v5p:4x4x4", "tpu:v5e:4x4", "gpu:h100:8", "gpu:h100:16"):
        assert chips.parse_target(text).text == text
    assert chips.parse_target("tpu:v5p:2x2x4").shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpu:v5q:4x4", "did you mean 'v5p'|did you mean 'v5e'"),
        ("gpu:h10:8", "did you mean 'h100'"),
        ("tpuu:v5p:4x4x4", "did you mean 'tpu'"),
        ("tpu", "expected tpu:CHIP:SHAPE"),
        ("tpu:v5p:4x4", "takes AxBxC, as in tpu:v5p:4x4x4"),
        ("tpu:v5e:0x4", "takes AxB"),
        ("gpu:h100:4x2", "N, the number of GPUs"),
        ("gpu:h100:12", "no whole nodes of 8; use 16"),
        ("v5p-64", "expected tpu:v5p:4x4x4 or gpu:h100:8"),
    ],
)
def test_a_target_that_is_none_is_one_line(text, says):
    with pytest.raises(UserError, match=says) as error:
        chips.parse_target(text)
    assert "\n" not in str(error.value)
