from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from djax.devices.sharding import DEFAULT_RULES, leaf_name, named_leaves, partition_spec, shardings
from djax.models import abstract_params, logical_axes
from djax.models.config import LladaMoeConfig

CONFIG = LladaMoeConfig(
    vocab_size=24, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=4,
    experts_per_token=2, expert_size=8, rms_norm_eps=1e-5, rope_theta=1e4, max_positions=64, mask_id=None, eos_id=1,
    pad_id=1)


def mesh(**sizes: int) -> AbstractMesh:
    """The rules only read a mesh's axis names and sizes, so no devices are needed."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(("axes", "shape", "sizes", "expected"), [
    (("vocab", "embed"), (24, 16), {"tensor": 2}, P("tensor", None)),
    (("experts", "ffn", "embed"), (4, 8, 16), {"tensor": 2, "expert": 4}, P("expert", "tensor", None)),
    (("experts", "ffn", "embed"), (4, 8, 16), {"expert": 4}, P("expert", None, None)),
    (("experts", "embed", "ffn"), (4, 16, 8), {"tensor": 8}, P(None, None, "tensor")),
    (("heads", "head_dim", "embed"), (4, 4, 16), {"tensor": 4, "data": 2}, P("tensor", None, None)),
    ((None, "embed"), (4, 16), {"tensor": 3, "expert": 5}, P(None, None)),
    (("batch", None), (6, 5), {"data": 3}, P("data", None)),
    (("unheard_of",), (5,), {"tensor": 2}, P(None)),
    ((), (), {"tensor": 2}, P()),
])
def test_default_rules(
    axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: dict[str, int], expected: P) -> None:
    assert partition_spec(axes, shape, mesh=mesh(**sizes)) == expected


def test_an_axis_over_two_mesh_axes_keeps_those_that_exist() -> None:
    rules = {"vocab": ("tensor", "expert", "absent")}
    both = partition_spec(("vocab",), (24,), mesh=mesh(tensor=2, expert=4), rules=rules)
    assert both == P(("tensor", "expert"))
    assert partition_spec(("vocab",), (24,), mesh=mesh(expert=4), rules=rules) == P("expert")
    with pytest.raises(ValueError, match="size 24, which cannot be split evenly over 16"):
        partition_spec(("vocab",), (24,), mesh=mesh(tensor=4, expert=4), rules=rules)


def test_errors_name_the_parameter_and_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"^head: got axis 'vocab' of size 25, .* over 2 devices \(mesh axes tensor\)"):
        partition_spec(("vocab", "embed"), (25, 16), mesh=mesh(tensor=2), name="head")
    with pytest.raises(ValueError, match=r"^moe: got axes 'experts' and 'ffn' that are both split over .* 'tensor'"):
        partition_spec(("experts", "ffn"), (4, 8), mesh=mesh(tensor=2),
                       rules={"experts": "tensor", "ffn": "tensor"}, name="moe")
    with pytest.raises(ValueError, match=r"^moe: .*'tensor'"):
        partition_spec(("experts",), (4,), mesh=mesh(tensor=2), rules={"experts": ("tensor", "tensor")}, name="moe")
    with pytest.raises(ValueError, match=r"^norm: got 2 axis names"):
        partition_spec(("vocab", "embed"), (16,), mesh=mesh(tensor=2), name="norm")


def test_a_models_tree() -> None:
    real = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("tensor", "expert"))
    abstract = abstract_params(CONFIG)
    tree = shardings(logical_axes(CONFIG), abstract, mesh=real)
    assert jax.tree.structure(tree) == jax.tree.structure(abstract)
    found = named_leaves(tree)
    assert all(isinstance(sharding, NamedSharding) and sharding.mesh == real for sharding in found.values())
    assert found["layers.0.moe.gate"].spec == P("expert", "tensor", None)
    assert found["layers.0.moe.down"].spec == P("expert", None, "tensor")
    both = ("tensor", "expert")
    assert found["layers.0.attention.output"].spec == P(None, both, None)
    assert found["layers.0.attention.value"].spec == P(both, None, None)
    assert found["embed"].spec == P(both, None)
    # The same for the pure dict, and every name is there once.
    assert named_leaves(shardings(logical_axes(CONFIG), nnx.to_pure_dict(abstract), mesh=real)) == found
    assert len(found) == len(jax.tree.leaves(abstract))


def test_an_error_in_a_tree_names_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"^layers.0.attention.key: got axis 'kv_heads' of size 2, .* over 4"):
        shardings(logical_axes(CONFIG), abstract_params(CONFIG), mesh=mesh(tensor=4), rules={"kv_heads": "tensor"})


def test_trees_that_differ() -> None:
    axes = logical_axes(CONFIG)
    del axes["norm"]
    with pytest.raises(ValueError, match="first norm"):
        shardings(axes, abstract_params(CONFIG), mesh=mesh(tensor=2))


def test_without_a_mesh_all_is_on_the_default_device() -> None:
    tree = shardings({"a": ("vocab",)}, {"a": jnp.zeros(3)})
    assert isinstance(tree["a"], SingleDeviceSharding)
    assert tree["a"].device_set == jnp.zeros(()).devices()


def test_explicit_meshes() -> None:
    real = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    tree = shardings({"a": ("vocab",)}, {"a": jnp.zeros(4)}, mesh=real)
    array = jax.device_put(jnp.arange(4.0), tree["a"])
    assert array.sharding.spec == P("tensor")


def test_leaf_names_are_the_same_for_a_state_and_its_dict() -> None:
    state = nnx.State({"layers": {0: {"value": nnx.Param(jnp.zeros(1))}}})
    for tree in (state, nnx.to_pure_dict(state)):
        ((path, _),) = jax.tree_util.tree_flatten_with_path(tree)[0]
        assert leaf_name(path) == "layers.0.value"


@settings(max_examples=200, deadline=None)
@given(axes=st.lists(st.sampled_from([None, *DEFAULT_RULES]), max_size=4),
       sizes=st.lists(st.integers(1, 12), min_size=4, max_size=4),
       tensor=st.integers(1, 4), expert=st.integers(1, 4))
def test_a_spec_is_a_valid_sharding_or_an_error(
    axes: list[str | None], sizes: list[int], tensor: int, expert: int) -> None:
    target = mesh(tensor=tensor, expert=expert)
    shape = tuple(sizes[: len(axes)])
    try:
        spec = partition_spec(tuple(axes), shape, mesh=target)
    except ValueError as error:
        assert str(error).startswith("array: ")  # noqa: PT017
        return
    shard = NamedSharding(target, spec).shard_shape(shape)  # raises unless the spec divides the shape
    for name, size, part in zip(axes, shape, shard, strict=True):
        over = (DEFAULT_RULES.get(name) or ()) if name else ()
        assert part * (tensor if "tensor" in over else 1) * (expert if "expert" in over else 1) == size
