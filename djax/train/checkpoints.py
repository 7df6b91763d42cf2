"""Checkpoints of a run: Orbax directories, each complete or absent, the newest ones kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from djax.errors import ArgumentError, check_integer, first_line
from djax.train.step import TrainState


def _flat(state: TrainState) -> dict[str, Any]:
    """Leaves by a name that says where they are; plain strings, so that any Orbax user can read them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class Checkpoints:
    """The checkpoints in one directory.

    Orbax writes each under another name and renames it when it is on disk: whenever the process is killed, the
    ones before it stay whole, and what was being written is not taken for one.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        """Open `directory`, which is created. Raises OSError if that cannot be, ArgumentError if `keep` is below 1."""
        check_integer("keep", keep, 1)
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory.resolve()
        self._manager = ocp.CheckpointManager(
            self._directory, item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True))

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, rising."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Write a checkpoint and wait until it is on disk; one of the same step that is there stays.

        Raises:
            OSError: it cannot be written. Earlier checkpoints are untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_flat(state)), meta=ocp.args.JsonSave(dict(meta))))
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise several kinds for a failed write
            raise OSError(
                f"{self._directory / str(step)}: got a checkpoint that cannot be written ({first_line(error)}); "
                "allowed a directory with free space; the earlier checkpoints are whole: free some and start again"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint and its `meta`, with the dtypes and shardings of `like`; None if there is none.

        Raises:
            ValueError: it is damaged, or of another model or optimizer; names the directory and what to do.
        """
        if not self.steps:
            return None
        step = self.steps[-1]
        meta = self._read(step, ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        target = _flat(jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like))
        found = self._read(step, ocp.args.Composite(state=ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)))).state
        for name, leaf in target.items():
            if found[name].shape != leaf.shape:
                raise ArgumentError(
                    str(self._directory / str(step)), f"the shape {found[name].shape} of {name}",
                    allowed=f"{leaf.shape}, which model and optimizer of this run have",
                    advice="use the configuration it was made with, or another output")
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in target]), meta

    def close(self) -> None:
        """Release Orbax's threads."""
        self._manager.close()

    def _read(self, step: int, arguments: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=arguments)
        except Exception as error:  # Orbax and TensorStore raise several kinds for a damaged file
            earlier = self.steps[:-1]
            go_on = f"go on from step {earlier[-1]}" if earlier else "start anew"
            raise ArgumentError(
                str(self._directory / str(step)), f"a checkpoint that cannot be restored ({first_line(error)})",
                allowed="a complete one of this configuration", advice=f"remove that directory to {go_on}") from error
