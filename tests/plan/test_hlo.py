"""Reading compiled modules: every spelling counts once, in the loop that holds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from djax.plan import hlo

ROOT = Path(__file__).parents[2]
MODULE = """HloModule jit_f, is_scheduled=true, num_partitions=8

FunctionNames
1 "gmm"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}

StackFrames
7 {file_location_id=1 parent_frame_id=7}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_psum (param_0: bf16[96,2048]) -> bf16[96,2048] {
  ROOT %psum.2 = bf16[96,2048]{1,0} all-reduce(%param_0), channel_id=1, replica_groups=mesh['expert'=2,'tensor'=4] {'tensor','expert'}, to_apply=%sum, metadata={op_name="jit(f)/while/body/layer_3/moe/psum"}
}

%refresh (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a.1 = ((bf16[2,512]{1,0}), bf16[16,512]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(f)/while/body/layer_0/attention/all_gather"}
  %a.2 = bf16[16,512]{1,0} all-gather-done(%a.1)
  %r.1 = f32[16,512]{1,0:T(8,128)S(1)} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%i, %z)
}

%refresh_more (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%kernel_loop (p: (s32[])) -> (s32[]) {
  %c.1 = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
  %c.2 = f32[4]{0} collective-permute-done(%c.1)
  ROOT %tuple.2 = (s32[]) tuple(%i)
}

%window (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion-start.1 = ((bf16[96,2048]{1,0}), bf16[96,2048]{1,0}) fusion-start(%h), kind=kCustom, calls=%fused_psum
  %fusion-done.1 = bf16[96,2048]{1,0} fusion-done(%fusion-start.1)
  %ar.1 = (f32[96]{0}, /*index=1*/f32[]{:T(256)}) all-reduce(%u, %v), replica_groups=mesh['expert'=2,'tensor'=4] {'tensor'}, to_apply=%sum, metadata={op_name="jit(f)/while/body/head/psum"}
  %ar.2 = ((f32[10]{0}), f32[10]{0}) all-reduce-start(%u2), replica_groups={}, to_apply=%sum
  %ar.3 = f32[10]{0} all-reduce-done(%ar.2)
  %while.9 = (s32[]) while(%q), condition=%refresh_more, body=%kernel_loop, backend_config={"known_trip_count":{"n":"3"}}
  %k.1 = bf16[96,2048]{1,0} custom-call(%h), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/while/body/layer_3/moe/jit(moe)/moe_gate_up/mpmd_map"}
  %k.2 = bf16[96,2048]{1,0} custom-call(%h), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/shard_map/pallas_call/pallas_call" stack_frame_id=7}
  %k.3 = bf16[96,2048]{1,0} custom-call(%h), custom_call_target="AllocateBuffer"
  ROOT %tuple.3 = (s32[], f32[8]) tuple(%i, %z)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], f32[8]) while(%p), condition=%refresh_more, body=%refresh
  ROOT %while.2 = (s32[], f32[8]) while(%while.1), condition=%refresh_more, body=%window
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %ar.4 = s8[3,7]{1,0} all-to-all(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %while.3 = (s32[], f32[8]) while(%t), condition=%refresh_more, body=%outer
  ROOT %g = f32[8] get-tuple-element(%while.3), index=1
}
"""  # noqa: E501


def test_every_spelling_counts_once() -> None:
    module = hlo.read_module(MODULE)
    assert [(one.kind, one.nbytes, one.group) for one in module.collectives] == [("all-to-all", 21, 2)]
    steps = hlo.generation_steps(module, cached=True)
    assert [(one.kind, one.nbytes, one.group) for one in steps["refresh"].pass_collectives()] == [
        ("all-gather", 16 * 512 * 2, 8), ("reduce-scatter", 4 * 16 * 512 * 4, 4)]
    window = steps["window"].pass_collectives()
    assert [(one.kind, one.nbytes, one.group) for one in window] == [
        ("all-reduce", 96 * 2048 * 2, 8), ("all-reduce", 97 * 4, 4), ("all-reduce", 40, 8),
        *[("collective-permute", 16, 2)] * 3]
    assert [one.layer for one in window[:3]] == [3, None, None]
    assert hlo.count(window) == {
        "all-reduce": {"count": 3, "bytes": 96 * 4096 + 97 * 4 + 40, "largest": 96 * 4096},
        "collective-permute": {"count": 3, "bytes": 48, "largest": 16}}


def test_kernels_have_names() -> None:
    window = hlo.generation_steps(hlo.read_module(MODULE), cached=True)["window"]
    assert hlo.kernel_names(window.pass_kernels()) == {"moe_gate_up": 1, "gmm": 1}
    assert [loop.trips for loop in window.inner] == [3]


def test_without_a_cache_the_largest_loop_is_the_step() -> None:
    module = hlo.read_module(MODULE)
    assert hlo.generation_steps(module, cached=False)["refresh"].name == "while.3"
    assert len(hlo.generation_steps(module, cached=False)["refresh"].pass_collectives()) == 8


def test_what_is_no_generation_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read_module("nothing")
    with pytest.raises(ValueError, match="loop"):
        hlo.generation_steps(hlo.read_module("ENTRY %main (p: f32[]) -> f32[] {\n}\n"), cached=True)


SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from djax.plan import hlo

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "tensor"))

def first(carry):
    return carry[0] + 1, lax.psum(jnp.sin(carry[1]), "tensor")

def second(carry):
    with jax.named_scope("layer_1"):
        x = lax.psum(jnp.cos(carry[1]), ("expert", "tensor"))
    gathered = lax.all_gather(x[:2], "expert", tiled=True)
    part = lax.psum_scatter(x, "tensor", tiled=True)
    return carry[0] + 1, x + gathered.sum() + part.sum()

def both(carry):
    carry = lax.while_loop(lambda c: c[0] % 3 == 0, first, carry)
    return lax.while_loop(lambda c: c[0] % 3 != 0, second, carry)

def run(n, x):
    return lax.while_loop(lambda c: c[0] < n, both, (jnp.int32(0), x))[1]

compiled = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)).lower(
    jnp.int32(9), jnp.ones((8, 4))).compile()
steps = hlo.generation_steps(hlo.read_module(compiled.as_text()), cached=True)
print(json.dumps({name: sorted((one.kind, one.nbytes, one.group, one.layer) for one in step.pass_collectives())
                  for name, step in steps.items()}))
"""


def test_what_a_compiler_writes() -> None:
    """Eight fake devices; the counts are those of the function above."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refresh"] == [["all-reduce", 128, 4, None]]
    assert found["window"] == [
        ["all-gather", 64, 2, None], ["all-reduce", 128, 8, 1], ["reduce-scatter", 128, 4, None]]
