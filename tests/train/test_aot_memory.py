"""What the compiler says where a step does not fit."""

import math

from jaxreason.core import chips
from jaxreason.train import aot, aot_memory
from jaxreason.train.aot_memory import Buffer

# Captured from libtpu 0.0.52.
MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (60.15G) exceeds available HBM (15.75G). HLO module: "
    "jit_train_step.\nSee https://openxla.org/xla/errors/error_1000 for more details."
)
# The older form, which lists its allocations.
LISTED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. \
Exceeded hbm capacity by 1.75G.

Total hbm usage >= 17.75G:
    reserved        258.00M
    program          16.00G
    arguments         1.50G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(train_step)/mul" source_file="a.py" source_line=3
     Shape: f32[2,128,2048,4096]{3,2,1,0:T(8,128)}
     Unpadded size: 8.00G
     XLA label: fusion.12
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[128,2048,1024]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     Allocation type: HLO temp
     ==========================
"""
LIVE = """BufferLiveRange:
    fusion.7{0}:10-20
  Live ranges at 228 (peak):
    custom-call.22{}: 8589934592 bytes (cumulative: 8589934592 bytes)
    fusion.7{1}: 134217728 bytes (cumulative: 8724152320 bytes)
    param.103{}: 8388608 bytes (cumulative: 8732540928 bytes)
    gone{}: 4 bytes (cumulative: 8732540932 bytes)
  Stack trace breakdown for peak usage: 1 bytes
    custom-call.99{}: 5 bytes (cumulative: 5 bytes)
"""
MODULE = """HloModule jit_train_step

%body (w: f32[4]) -> f32[2,128,2048,4096] {
  %w = f32[4]{0} parameter(0)
  ROOT %dus = f32[2,128,2048,4096]{3,2,1,0} dynamic-update-slice(%w), metadata={op_name="jit(train_step)/while/body/dynamic_update_slice"}
}

ENTRY %main (param.103: f32[2,256,4096]) -> f32[4] {
  %param.103 = f32[2,256,4096]{2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\\'model\\']/up"}
  %custom-call.22 = f32[2,128,2048,4096]{3,2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="broadcast.82"}
  ROOT %fusion.7 = (f32[4]{0}, /*index=1*/f32[128,2048,128]{2,1,0}) fusion(%param.103), kind=kLoop, calls=%body, metadata={op_name="jit(train_step)/sin"}
}
"""  # noqa: E501


def test_the_message_of_temporaries():
    over = aot_memory.read_message(MESSAGE, arguments=3 * 2**30, limit=16 * 2**30)
    assert over.temporaries == 60.15 * 2**30 and over.limit == 15.75 * 2**30
    assert over.needed == 63.15 * 2**30 and over.buffers == ()


def test_the_message_that_lists_allocations():
    over = aot_memory.read_message(LISTED, arguments=1.5 * 2**30, limit=16 * 2**30)
    assert over.needed == 17.5 * 2**30 and over.limit == 15.75 * 2**30
    assert over.buffers == (
        Buffer(8 * 2**30, "f32[2,128,2048,4096]", "jit(train_step)/mul"),
        Buffer(512 * 2**20, "bf16[128,2048,1024]", ""),
    )


def test_a_message_that_tells_nothing_keeps_what_is_known():
    over = aot_memory.read_message("RESOURCE_EXHAUSTED: no.", arguments=5.0, limit=7.0)
    assert over.arguments == 5 and over.limit == 7 and math.isnan(over.temporaries)


def test_the_arrays_of_the_peak_by_name():
    assert aot_memory.at_peak(LIVE, MODULE) == (
        Buffer(
            8589934592.0,
            "f32[2,128,2048,4096]",
            "what a scan keeps of every turn, for the backward pass",
        ),
        Buffer(134217728.0, "f32[128,2048,128]", "jit(train_step)/sin"),
        Buffer(8388608.0, "f32[2,256,4096]", "state.params[\\'model\\']/up"),
    )
    assert len(aot_memory.at_peak(LIVE, MODULE, n=1)) == 1


def test_the_largest_arrays_of_a_module():
    largest = aot_memory.largest(MODULE)
    # Not the body of the fusion, whose arrays are never in memory.
    assert [(b.shape, b.bytes) for b in largest] == [("f32[2,128,2048,4096]", 2**31 * 4)]


def test_what_jax_takes_of_a_chips_memory(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    usable = {name: aot._usable(chips.NAMES[name]) for name in ("v5p", "h100")}
    assert usable == {"v5p": 1.0, "h100": 0.75}
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert aot._usable(chips.NAMES["h100"]) == 0.92
