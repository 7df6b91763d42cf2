"""PyTorch on the same shapes: transformers' Qwen3-MoE made bidirectional, which is LLaDA-MoE by other authors.

    python -m benchmarks.torch_moe          # needs torch with CUDA and transformers
    python -m benchmarks.torch_moe --tiny   # toy shapes on any device

A forward is djax's: a window against keys and values of the whole canvas, written in place; the head, the best token
and its log-probability on the block only. Every experts implementation of transformers that allows it runs in a CUDA
graph, grouped products also through `torch.compile`; on a CPU without both. Weights are random, in bfloat16.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.harness import command, timing
from benchmarks.harness.cases import Case, Sizes, Unsupported
from benchmarks.harness.ceilings import Ceilings
from djax.plan import roofline

GROUPS = ("torch",)
EXPERTS = ("grouped_mm", "batched_mm", "eager")
COMPILED = ("reduce-overhead", "max-autotune-no-cudagraphs")
"""Modes of `torch.compile`; the first makes its own CUDA graphs."""
BATCHED_LIMIT = 16 * 2**30
"""Bytes of expert weights that `batched_mm` may copy in one layer; beyond it is not tried."""
SHARPNESS = 4.0
"""As in `benchmarks.forward.network`."""


def missing() -> str | None:
    """Why there is nothing to measure, in one line."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        return f"not installed: {error.name}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device. --tiny runs toy shapes on any device."


def device_name() -> str:
    """"cuda" where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def wait(_: Any = None) -> None:
    """For all that was queued."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alive() -> bool:
    """Whether the device still computes."""
    import torch

    try:
        return bool((torch.zeros(8, device=device_name()) + 1 == 1).all())
    except RuntimeError:
        return False


def ceilings(sizes: Sizes) -> dict[str, Any]:
    """Ceilings in PyTorch, as `timing.measure_ceilings` measures them in JAX."""
    import torch

    source = torch.empty(sizes.copy_bytes // 4, dtype=torch.int32, device=device_name())
    source.random_()
    target = torch.empty_like(source)
    copy = timing.measure(lambda _, to=target, of=source: to.copy_(of), wait, sizes.budget)
    del source, target
    size = sizes.matmul_size
    left, right = (torch.randn(size, size, device=device_name(), dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    product = timing.measure(lambda _: torch.mm(left, right, out=out), wait, sizes.budget)
    return {
        "copy": copy.per(1) | {"bytes": 2 * sizes.copy_bytes,
                               "bytes_per_second": 2 * sizes.copy_bytes / copy.seconds.median},
        "matmul": product.per(1) | {"size": size, "flops": 2 * size**3,
                                    "flops_per_second": 2 * size**3 / product.seconds.median}}


def device() -> dict[str, Any]:
    """The device as PyTorch describes it."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"platform": device_name(), "device_kind": name, "torch": torch.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda}


class TorchNetwork:
    """The model on the device, and its windowed forward."""

    def __init__(self, sizes: Sizes) -> None:
        import torch
        from transformers import Qwen3MoeForCausalLM

        from benchmarks.decode.torch_twin import twin_config

        config = sizes.config
        self.sizes, self.device = sizes, device_name()
        if self.device == "cpu":
            torch.set_num_threads(1)  # on a shared machine threads that wait for each other take seconds
        fields = twin_config({
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads, "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token, "expert_intermediate_size": config.expert_size,
            "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta,
            "max_position_embeddings": config.max_positions})
        fields.dtype = torch.bfloat16
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                self.model = Qwen3MoeForCausalLM(fields).eval()
        finally:
            torch.set_default_dtype(before)
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False
            layer.self_attn.q_norm.weight.data.fill_(SHARPNESS)
            layer.self_attn.k_norm.weight.data.fill_(SHARPNESS)

    def forward(self, window: int, context: int, batch: int, experts: str) -> Callable[[], Any]:
        """A function of nothing that runs one forward on fixed buffers, as a CUDA graph needs them."""
        import torch

        from benchmarks.decode.torch_twin import WindowCache

        config, block = self.sizes.config, self.sizes.block(window)
        self.model.set_experts_implementation(experts)
        start, offset = (context - window) // 2, (window - block) // 2
        cache = WindowCache(config.num_layers)
        shape = (batch, config.num_kv_heads, context, config.head_dim)
        cache.place(None, context)
        for layer in range(config.num_layers):
            cache.update(*(torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(2)), layer)
        cache.place(slice(start, start + window), context)
        # entries of size one and none like another: positions go to different experts, see `benchmarks.forward.network`
        inputs = torch.randn(batch, window, config.hidden_size, device=self.device, dtype=torch.bfloat16)
        positions = torch.arange(start, start + window, device=self.device)[None]

        def run() -> Any:
            hidden = self.model.model(
                inputs_embeds=inputs, position_ids=positions, past_key_values=cache, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, offset : offset + block]).float()
            best, token = logits.max(-1)
            return token, best - logits.logsumexp(-1)

        return run


def capture(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """`run` as a CUDA graph, and a note; `run` itself where it cannot be one, and the note says why."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is chosen or allocated at first use must not be part of the graph
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return run, f"no CUDA graph: {str(error).splitlines()[0]}"
    return graph.replay, "CUDA graph"


def build(sizes: Sizes, measured: Ceilings, groups: Sequence[str]) -> Iterable[Case]:
    """Every setting on the targets' shape; over the matrix the plain ones in CUDA graphs."""
    del groups
    network = TorchNetwork(sizes)

    def case(experts: str, mode: str | None, window: int, context: int, batch: int, priority: int) -> Case:
        name = f"torch.{experts}" if mode is None else f"torch.{experts}.{mode}"
        return Case(group="forward", implementation=name, priority=priority,
                    shape={"batch": batch, "window": window, "context": context},
                    prepare=lambda: lambda: act(network, measured, experts, mode, window, context, batch))

    def cases() -> Iterator[Case]:
        for experts in EXPERTS:
            yield case(experts, None, *sizes.main, 0)
        for mode in COMPILED:
            yield case("grouped_mm", mode, *sizes.main, 0)
        for batch in sizes.batches:
            for context in sizes.contexts:
                for window in sizes.windows:
                    if (window, context, batch) != sizes.main:
                        yield case("grouped_mm", None, window, context, batch,
                                   sizes.priority(window, context, batch))

    return cases()


def act(
    network: TorchNetwork, measured: Ceilings, experts: str, mode: str | None, window: int, context: int, batch: int
) -> dict[str, Any]:
    """Make the forward ready and time it. Nothing is prepared beside others: torch compiles in one thread."""
    import torch

    sizes = network.sizes
    config, rows = sizes.config, batch * window
    copied = 6 * rows * config.experts_per_token * config.expert_size * config.hidden_size
    if experts == "batched_mm" and copied > BATCHED_LIMIT:
        raise Unsupported(f"it would copy {copied / 2**30:.0f} GiB of weights in one layer")
    if mode is not None and network.device == "cpu":
        raise Unsupported("torch.compile is measured on a GPU only")
    # eager asks the host which experts have rows, which no graph can hold
    graphs = experts != "eager" and mode != "reduce-overhead"
    with torch.inference_mode():
        run = network.forward(window, context, batch, experts)
        if mode is not None:
            torch.compiler.reset()
            run = torch.compile(run, mode=mode)
        ready, note = capture(run) if graphs and network.device == "cuda" else (run, "no CUDA graph")
        taken = timing.measure(lambda _: ready(), wait, sizes.budget)
    cost = roofline.total(roofline.forward_parts(
        config, batch=batch, window=window, context=context, head_rows=sizes.block(window)).values())
    return {**taken.per(1), **dataclasses.asdict(cost), **measured.shares(cost, taken.seconds.median),
            "note": note, "forwards_per_second": 1 / taken.seconds.median}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = command.options("benchmarks.torch_moe", __doc__.partition("\n")[0], GROUPS)
    found = command.parse(parser, arguments, GROUPS)
    found.together = 1
    return command.run(found, "benchmarks.torch_moe", build, ceilings=ceilings, missing=missing, is_alive=alive,
                       device=device)


if __name__ == "__main__":
    sys.exit(main())
