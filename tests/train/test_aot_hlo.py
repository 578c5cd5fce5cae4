"""Collectives read from the text of compiled modules: bytes, counts, axes."""

import json

import numpy as np
import pytest
from support import run_python

from jaxreason.train import aot_hlo

MESH = {"data": 2, "fsdp": 4}
# As the TPU and GPU compilers print them, shortened.
LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start_fusion (p: f32[1,128]) -> f32[1,512] {
  %p = f32[1,128]{1,0:T(1,128)} parameter(0)
  %all-gather.1 = f32[1,512]{1,0:T(1,128)} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}, metadata={op_name="jit(step)/while/body/mul"}
  ROOT %custom-call.1 = (f32[1,128]{1,0}, f32[1,512]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step_fusion (q: f32[1,128]) -> f32[1,512] {
  %q = f32[1,128]{1,0:T(1,128)} parameter(0)
  ROOT %all-gather.2 = f32[1,512]{1,0:T(1,128)} all-gather(%q), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.3 (r: bf16[64]) -> bf16[16] {
  %r = bf16[64]{0} parameter(0)
  %whole = bf16[64]{0} all-reduce(%r), channel_id=20, replica_groups=[2,4]<=[8], to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = bf16[16]{0} dynamic-slice(%whole, %at), dynamic_slice_sizes={16}
}

%body (w: (s32[], f32[1,128])) -> (s32[], f32[1,128]) {
  %w = (s32[]{:T(128)}, f32[1,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  %x = f32[1,128]{1,0} get-tuple-element(%w), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %kernel = f32[1,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"body": "TUxJUg",
 "xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/while/body/splash"}
  %fusion.1 = (f32[1,128]{1,0}, f32[1,512]{1,0}) fusion(%x), kind=kCustom, calls=%start_fusion
  %fusion.2 = f32[1,512]{1,0} fusion(%x), kind=kOutput, calls=%step_fusion
  %ar = f32[1,128]{1,0} all-reduce(%x), channel_id=8, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add, metadata={op_name="jit(step)/while/body/psum"}
  ROOT %out = (s32[]{:T(128)}, f32[1,128]{1,0}) tuple(%next, %ar)
}

%condition (v: (s32[], f32[1,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %v = (s32[]{:T(128)}, f32[1,128]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%v), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (arg: f32[1,128]) -> f32[1,128] {
  %arg = f32[1,128]{1,0:T(1,128)} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[1,128]) tuple(%zero, %arg)
  %while.1 = (s32[]{:T(128)}, f32[1,128]{1,0}) while(%init), condition=%condition, body=%body
  %cp = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%arg), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %cpd = bf16[4,8]{1,0} collective-permute-done(%cp)
  %ags = ((f32[8]{0}, f32[16]{0}), (f32[64]{0}, f32[128]{0})) all-gather-start(%arg, %arg), channel_id=10, replica_groups=[1,8]<=[8], dimensions={0}
  %agd = (f32[64]{0}, f32[128]{0}) all-gather-done(%ags)
  %fused = bf16[16]{0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter.3
  %rs = bf16[16]{0} reduce-scatter(%arg), channel_id=11, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%arg), channel_id=12, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %gte = f32[1,128]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_kinds_counts_bytes_and_axes():
    found = {(c.kind, c.axes): c for c in aot_hlo.collectives(LOOP, MESH)}
    get = {key: (c.count, c.sent, c.group) for key, c in found.items()}
    assert get == {
        # Five turns: the counter goes by two to ten. The steps of a spread gather are not counted.
        ("all-gather", ("fsdp",)): (5, 5 * 512 * 4 * 3 / 4, 4),
        ("all-reduce", ("data",)): (5, 5 * 2 * 128 * 4 * 1 / 2, 2),
        ("collective-permute", ("fsdp",)): (1, 4 * 8 * 2, 4),
        ("all-gather", ("data", "fsdp")): (1, (64 + 128) * 4 * 7 / 8, 8),
        # A sum of which a slice is kept sends half of what the sum would.
        ("reduce-scatter", ("fsdp",)): (1, 64 * 2 * 3 / 4, 4),
        # A transposed list: the groups are 0 2 4 6 and 1 3 5 7, half of fsdp and all of data.
        ("reduce-scatter", ("data", "part of fsdp")): (1, 3 * 16 * 2, 4),
    }
    assert found["all-reduce", ("data",)].source == "jit(step)/while/body/psum"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_in_every_form(text, rows):
    got = aot_hlo.groups(f"channel_id=1, {text}, dimensions={{0}}", 4)
    assert got is not None
    np.testing.assert_array_equal(got, rows)


def test_a_loop_counts_as_the_compiler_says_where_it_does():
    text = LOOP.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"},"x":1}'
    )
    found = {(c.kind, c.axes): c.count for c in aot_hlo.collectives(text, MESH)}
    assert found["all-gather", ("fsdp",)] == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[], (s8[4], pred[2]), u32[]{:S(2)})", 4 + 4 + 2 + 4),
        ("s4[6]", 3),
        ("token[]", 0),
    ],
)
def test_bytes_of_types(text, size):
    assert aot_hlo.type_bytes(text) == size


def test_what_this_machines_compiler_makes_of_known_transfers():
    """Eight simulated devices: a gather, a sum over one axis, a sum in a loop, a permute."""
    out = run_python("""
        import json
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxreason.train import aot_hlo
        mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

        def each(x, w):
            whole = jax.lax.all_gather(w, "fsdp", tiled=True)
            def turn(c, _):
                return jax.lax.psum(c, "data") * 0.5, None
            x, _ = jax.lax.scan(turn, x, None, length=6)
            x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.psum(x, ("data", "fsdp")) + whole.sum()

        step = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(P(), P("fsdp")), out_specs=P(),
                                     check_vma=False))
        put = lambda spec: NamedSharding(mesh, spec)
        shapes = (jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=put(P())),
                  jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=put(P("fsdp"))))
        text = step.lower(*shapes).compile().as_text()
        found = aot_hlo.collectives(text, dict(mesh.shape))
        print(json.dumps([[c.kind, c.axes, c.count, c.sent] for c in found]))
    """)
    found = {(kind, *axes): (count, sent) for kind, axes, count, sent in json.loads(out)}
    x, w = 16 * 32 * 4, 64 * 32 * 4
    assert found == {
        ("all-gather", "fsdp"): (1, w * 3 / 4),
        ("all-reduce", "data"): (6, 6 * 2 * x * 1 / 2),
        ("collective-permute", "fsdp"): (1, x),
        ("all-reduce", "data", "fsdp"): (1, 2 * x * 7 / 8),
    }
