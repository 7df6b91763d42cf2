"""The ops on one shape each: their operands, what they cost at least, and a case for an implementation of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import timing
from benchmarks.harness.cases import Case, Sizes, Unsupported
from benchmarks.harness.ceilings import Ceilings, moe_cost
from djax.plan import roofline
from djax.plan.roofline import Cost
from kernels_pallas import quantize_experts

QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")
LINKS = 8
"""Attention is shorter than the start of a program, so one program holds a few, each fed by the last one's result."""


def candidates(implementations: Iterable[str]) -> list[str]:
    """Names to measure: not the reference, which is an oracle, and not another platform's."""
    tpu = jax.default_backend() == "tpu"
    return [name for name in implementations
            if name != "reference" and name.endswith("_tpu") <= tpu and name.endswith("_gpu") <= (not tpu)]


def compiled(function: Callable[..., Any], abstract: Sequence[Any], **options: Any) -> Any:
    """`function` compiled for the default device; `Unsupported` where it takes no such call."""
    try:
        return jax.jit(function, **options).lower(*abstract).compile()
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error


def abstract(*shapes: tuple[tuple[int, ...], str]) -> tuple[Any, ...]:
    """Arrays by shape and dtype only."""
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An op on one shape: what runs, on what, and what it costs at least."""

    group: str
    shape: dict[str, Any]
    priority: int
    operands: tuple[Any, ...]
    """Shapes and dtypes."""
    draw: Callable[[], Sequence[tuple[Any, ...]]]
    """Sets of operands, to rotate over; called when the case runs and freed after it."""
    cost: Cost
    units: int = 1
    """Executions of the op in one call."""

    def case(
        self, implementation: str, function: Callable[..., Any], sizes: Sizes, ceilings: Ceilings, **facts: Any
    ) -> Case:
        """This op by one implementation."""

        def prepare() -> Callable[[], dict[str, Any]]:
            program = compiled(function, self.operands)
            return lambda: self._time(program, sizes, ceilings) | facts

        return Case(group=self.group, implementation=implementation, shape=self.shape, priority=self.priority,
                    prepare=prepare)

    def _time(self, program: Any, sizes: Sizes, ceilings: Ceilings) -> dict[str, Any]:
        sets = self.draw()
        taken = timing.measure(lambda i: program(*sets[i % len(sets)]), jax.block_until_ready, sizes.budget)
        seconds = taken.seconds.median / self.units
        return {**taken.per(self.units), **dataclasses.asdict(self.cost), **ceilings.shares(self.cost, seconds),
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes, "operand_sets": len(sets) * self.units}


@partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: Any, scale: float, *, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal numbers of standard deviation `scale`, drawn in float32."""
    return (scale * jax.random.normal(key, shape)).astype(dtype)


class Drawn:
    """Random operands on the device. What many cases share, the weights, is kept."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._kept: dict[str, Any] = {}

    def normal(self, shape: tuple[int, ...], scale: float = 1.0, *, seed: int) -> Any:
        """Normal numbers in the model's dtype."""
        return normal(jax.random.key(seed), scale, shape=shape, dtype=self.sizes.config.dtype)

    def experts(self) -> tuple[Any, Any, Any]:
        """gate, up and down of one layer."""
        config = self.sizes.config
        wide = (config.num_experts, config.expert_size, config.hidden_size)
        narrow = (config.num_experts, config.hidden_size, config.expert_size)
        return self._keep("experts", lambda: (
            self.normal(wide, wide[2] ** -0.5, seed=1), self.normal(wide, wide[2] ** -0.5, seed=2),
            self.normal(narrow, narrow[2] ** -0.5, seed=3)))

    def quantized(self, dtype: str) -> Any:
        """The same in 8 bits."""
        return self._keep(dtype, lambda: jax.jit(partial(quantize_experts, dtype=dtype))(*self.experts()))

    def head(self) -> Any:
        """The vocabulary head."""
        config = self.sizes.config
        shape = (config.vocab_size, config.hidden_size)
        return self._keep("head", lambda: self.normal(shape, config.hidden_size**-0.5, seed=4))

    def embedding(self) -> Any:
        """The input embedding, an array of its own."""
        config = self.sizes.config
        return self._keep("embedding", lambda: self.normal((config.vocab_size, config.hidden_size), seed=10))

    def rows(self, count: int, seed: int = 5) -> Any:
        """Hidden states."""
        return self.normal((count, self.sizes.config.hidden_size), seed=seed)

    def routing(self, count: int) -> tuple[Any, Any]:
        """Experts and weights of `count` rows: each row's largest random logits, so no expert is preferred."""
        config = self.sizes.config
        logits = jax.random.normal(jax.random.key(6), (count, config.num_experts))
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
        return ids, weights

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def moe_op(drawn: Drawn, rows: int, priority: int) -> Op:
    """One layer's experts on `rows` tokens; the weights alone are far beyond any cache."""
    config = drawn.sizes.config
    slots, dtype = config.experts_per_token, config.dtype
    wide = (config.num_experts, config.expert_size, config.hidden_size)
    narrow = (config.num_experts, config.hidden_size, config.expert_size)
    return Op(
        group="moe", shape={"rows": rows}, priority=priority, cost=moe_cost(config, rows),
        operands=abstract(((rows, config.hidden_size), dtype), ((rows, slots), "int32"), ((rows, slots), "float32"),
                          (wide, dtype), (wide, dtype), (narrow, dtype)),
        draw=lambda: [(drawn.rows(rows), *drawn.routing(rows), *drawn.experts())])


def quantized_op(drawn: Drawn, rows: int, priority: int, dtype: str) -> Op:
    """The same with experts of 8 bits."""
    plain = moe_op(drawn, rows, priority)
    experts = jax.eval_shape(partial(quantize_experts, dtype=dtype), *plain.operands[3:])
    return dataclasses.replace(
        plain, shape={"rows": rows, "weights": dtype}, operands=(*plain.operands[:3], experts),
        cost=moe_cost(drawn.sizes.config, rows, weight_bytes=1),
        draw=lambda: [(drawn.rows(rows), *drawn.routing(rows), drawn.quantized(dtype))])


def routing_op(drawn: Drawn, rows: int) -> Op:
    """A layer's router on float32 logits: too short to be timed by itself."""
    shape = (rows, drawn.sizes.config.num_experts)
    return Op(
        group="top_k_route", shape={"rows": rows}, priority=0, operands=abstract((shape, "float32")),
        draw=lambda: [(normal(jax.random.key(6), 1.0, shape=shape, dtype="float32"),)], cost=Cost(0.0, 0.0))


def attention_op(drawn: Drawn, window: int, context: int, batch: int, priority: int) -> Op:
    """One layer's attention, several in a chain over different caches."""
    config = drawn.sizes.config
    query = (batch, window, config.num_heads, config.head_dim)
    cache = (batch, context, config.num_kv_heads, config.head_dim)
    cost = roofline.attention(config, batch, window, context)
    copies = timing.copies_beyond_cache(cost.bytes)
    links = min(LINKS, copies)

    def draw() -> list[tuple[Any, ...]]:
        mask = jnp.ones((batch, context), bool)
        return [(drawn.normal(query, seed=7), mask, *(
            drawn.normal(cache, seed=8 + 2 * links * number + side) for side in range(2 * links)))
            for number in range(-(-copies // links))]

    return Op(
        group="attention", shape={"batch": batch, "window": window, "context": context}, priority=priority,
        operands=abstract((query, config.dtype), ((batch, context), "bool"), *[(cache, config.dtype)] * (2 * links)),
        draw=draw, cost=cost, units=links)


def chained(attend: Callable[..., Any]) -> Callable[..., Any]:
    """`attend(query, key, value, mask)` link after link, each query being the last one's result."""

    def chain(query: Any, mask: Any, *caches: Any) -> Any:
        for key, value in zip(caches[::2], caches[1::2], strict=True):
            query = attend(query, key, value, mask)
        return query

    return chain


def unembed_op(drawn: Drawn, rows: int, priority: int) -> Op:
    """The head as a greedy step asks it: the best allowed token, its probability and the present token's."""
    config = drawn.sizes.config

    def draw() -> list[tuple[Any, ...]]:
        tokens = jax.random.randint(jax.random.key(9), (rows, 1), 0, config.vocab_size)
        return [(drawn.rows(rows), drawn.head(), tokens, jnp.array([config.mask_id], jnp.int32),
                 jnp.int32(config.vocab_size - 1))]

    return Op(
        group="unembed", shape={"rows": rows}, priority=priority, cost=roofline.unembed(config, rows), draw=draw,
        operands=abstract(((rows, config.hidden_size), config.dtype),
                          ((config.vocab_size, config.hidden_size), config.dtype), ((rows, 1), "int32"),
                          ((1,), "int32"), ((), "int32")))


def smoothing_op(drawn: Drawn, rows: int, priority: int) -> Op:
    """The head as iteration smoothing asks it: the expected embedding too, for which all of that is read."""
    config, plain = drawn.sizes.config, unembed_op(drawn, rows, priority)
    vocabulary = ((config.vocab_size, config.hidden_size), config.dtype)
    return dataclasses.replace(
        plain, shape={"rows": rows, "expected": "yes"}, operands=(*plain.operands, *abstract(vocabulary)),
        cost=roofline.unembed(config, rows, expected=True),
        draw=lambda: [(*operands, drawn.embedding()) for operands in plain.draw()])
