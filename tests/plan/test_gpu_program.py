"""The whole generation program, LLaDA-MoE at full size, compiled for one H200 that need not be here."""

from __future__ import annotations

import re

import pytest

from djax import recipes
from djax.plan.topology import missing_compiler
from tests.support.gpu_program import FULL_SIZE, Program, Thunk, generation, parse_thunks

reason = missing_compiler("h200:1")
needs_compiler = pytest.mark.skipif(reason is not None, reason=str(reason))

MOST_KERNELS_A_LAYER = 20
VOCABULARY = FULL_SIZE.vocab_size


def results(program: Program) -> list[tuple[str, str, str]]:
    """(computation, shape, operation) of every instruction that gives one array."""
    found, computation = [], ""
    for line in program.text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split(" (")[0]
        match = re.match(r"\s+(?:ROOT )?%\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line)
        if match:
            found.append((computation, match[1], match[2]))
    return found


def assert_nothing_large_is_copied(program: Program) -> None:
    """Neither experts, nor head, nor a cache in a loop; no logits of the vocabulary."""
    config, free = FULL_SIZE, {"parameter", "get-tuple-element", "bitcast", "tuple"}
    weights = {f"bf16[{config.num_experts},{a},{b}]" for a, b in (
        (config.expert_size, config.hidden_size), (config.hidden_size, config.expert_size))}
    weights |= {f"bf16[{VOCABULARY},{config.hidden_size}]"}
    for computation, shape, operation in results(program):
        assert shape not in weights or operation in free, f"{computation}: {operation} of {shape}"
        sizes = [int(size) for size in re.findall(r"\d+", shape.split("[")[1])]
        assert VOCABULARY not in sizes or shape in weights, f"{computation}: {shape}"
        # (the caches begin as zeros, which a fusion outside the loops writes)
        cache = re.fullmatch(rf"bf16\[\d+,\d+,{config.num_kv_heads},{config.head_dim}\]", shape)
        assert not cache or operation != "copy" or "broadcast" in computation, f"{computation}: copy of {shape}"


@needs_compiler
def test_the_program_for_one_h200() -> None:
    """One more layer costs at most 20 kernels in a step; the loop is one command buffer; nothing large is copied."""
    programs = [generation(layers=layers, command_buffer=True) for layers in (2, 3)]
    for loop, kind in enumerate(("refresh", "window")):
        counts = [len(program.innermost_loops()[loop].launches()) for program in programs]
        assert 0 < counts[1] - counts[0] <= MOST_KERNELS_A_LAYER, f"{kind}: {counts}"
    for program in programs:
        outer = [thunk for thunk in program.thunks.find("kWhile") if len(thunk.find("kWhile")) == 3]
        assert len(outer) == 1
        assert len(program.innermost_loops()) == 2
        holders = [buffer for buffer in program.thunks.find("kCommandBuffer") if buffer.find("kWhile")]
        assert len(holders) == 1, "the loop is cut into several command buffers"
        assert len(holders[0].find("kWhile")) == 3
        assert not outer[0].find("kCommandBuffer")
        assert_nothing_large_is_copied(program)
        assert "mosaic_gpu" in program.text


@needs_compiler
@pytest.mark.slow
def test_smoothing_holds_no_logits_either() -> None:
    program = generation(layers=2, recipe=recipes.dinfer_credit())
    assert_nothing_large_is_copied(program)


@needs_compiler
@pytest.mark.slow
def test_the_full_depth_fits_with_room_to_spare() -> None:
    program = generation(layers=16, command_buffer=True)
    assert 14.6e9 < program.argument_bytes < 14.9e9
    assert program.temporary_bytes < 1.0e9
    assert_nothing_large_is_copied(program)


def test_the_dump_is_read_as_it_is_indented() -> None:
    tree = parse_thunks("""000: kCommandBuffer [source | sink]
    001: kCopy  [source       | next=003 (2)] kCopy
    002: kWhile [prev=002 (1) | sink        ]
condition:
        003: kCustomKernel [source | sink] condition_fusion grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        004: kGemm [source | sink] cublas-gemm.1
005: kCustomKernel [source | sink] after grid: [1, 1, 1]
""")
    assert [thunk.kind for thunk in tree.inner] == ["kCommandBuffer", "kCustomKernel"]
    loop = tree.find("kWhile")[0]
    assert loop == Thunk("kWhile", "", [Thunk("kCustomKernel", "condition_fusion"), Thunk("kGemm", "cublas-gemm.1")])
    assert [thunk.name for thunk in tree.launches()] == ["kCopy", "condition_fusion", "cublas-gemm.1", "after"]
