"""The canvas: the [B, T] buffer being denoised, built from ragged prompts or from pinned tokens.

Prompts are right-aligned: left padding, then the prompt, then the open positions. Padding on either side
is never attended. Position 0 is a row's first real token, so a row reads the same wherever it sits.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from djax.contracts import struct
from djax.errors import ArgumentError, check_integer


@struct.dataclass
class Canvas:
    """The start of a denoising. T - first_block is a multiple of block_length."""

    tokens: Int[Array, "B T"]
    """int32; the mask id at masked positions."""
    is_masked: Bool[Array, "B T"]
    """The open positions. Nothing compares tokens with the mask id after the canvas is built."""
    valid: Bool[Array, "B T"]
    """False on padding."""
    positions: Int[Array, "B T"]
    """int32 rotary positions, 0 at the row's first real token."""
    mask_id: Int[Array, ""]
    """The token that a masked position feeds the model."""
    first_block: int = struct.field(pytree_node=False)
    """Canvas index of block 0's first position."""
    block_length: int = struct.field(pytree_node=False)
    row_axes: tuple[str, ...] = struct.field(pytree_node=False, default=())
    """Mesh axes over which the rows are split, inside `jax.shard_map`: the arrays are then one device's rows."""

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks that fit behind `first_block`."""
        return (self.length - self.first_block) // self.block_length

    def open_per_block(self, is_masked: Bool[Array, "B T"]) -> Int[Array, "B N"]:
        """Number of set positions in each block, int32."""
        region = is_masked[:, self.first_block:]
        return region.reshape(self.batch, self.num_blocks, self.block_length).sum(-1, dtype=jnp.int32)

    def any_row(self, flags: Bool[Array, "B N"]) -> Bool[Array, " N"]:
        """Logical or over all rows, including those on other devices: rows are in the same block at the same time."""
        found = flags.any(0)
        return lax.pmax(found.astype(jnp.int32), self.row_axes) > 0 if self.row_axes else found

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        block_length: int,
        mask_id: int,
        pad_id: int,
        align: bool = False,
        whole_blocks: bool = False,
        bucket: bool = True,
    ) -> Canvas:
        """Prompts followed by `max_new_tokens` masked positions each.

        Args:
            prompts: token ids per row, ragged; an empty prompt is allowed.
            max_new_tokens: open positions per row; need not be a multiple of `block_length`.
            block_length: positions decoded together (L).
            mask_id: token at open positions. One inside a prompt is an ordinary token and stays.
            pad_id: token on padding; never attended.
            align: put block boundaries on multiples of `block_length` counted from each row's first real
                token, as block-causal models need; block 0 may then begin with the prompt's last tokens.
            whole_blocks: with `align`, open the rest of each row's last block too. Models with blocks saw whole blocks
                of masks in training: one that ends early has other answers.
            bucket: round the prompt region and the number of blocks up to sizes of `bucket_size`, so
                that near lengths share one compiled program.

        Raises:
            ValueError: a length below 1, or no prompt at all.
        """
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("block_length", block_length, 1)
        rows = [np.asarray(list(prompt), np.int32) for prompt in prompts]
        length = block_length if align else 1
        lead = [len(row) // length * length for row in rows]
        rest = [-(len(row) + max_new_tokens) % length if whole_blocks else 0 for row in rows]
        opened = [max_new_tokens + more for more in rest]
        return cls._lay_out(
            [np.concatenate([row, np.full(count, mask_id, np.int32)]) for row, count in zip(rows, opened, strict=True)],
            [np.arange(len(row) + count) >= len(row) for row, count in zip(rows, opened, strict=True)],
            lead, block_length=block_length, mask_id=mask_id, pad_id=pad_id,
            bucket=bucket, worst_rest=length - 1 + max_new_tokens)

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[Sequence[int]],
        masked: Sequence[Sequence[bool]],
        *,
        block_length: int,
        mask_id: int,
        pad_id: int,
        align: bool = False,
        bucket: bool = True,
    ) -> Canvas:
        """Rows with open positions anywhere (infilling); all other tokens are pinned.

        Blocks begin at each row's first open position, or with `align` at the last multiple of `block_length`, counted
        from the row's first token, that is not after it; rows without one are only padded. Tokens under `masked` are
        replaced by the mask id.

        Raises:
            ValueError: shapes that differ, or no row at all.
        """
        check_integer("block_length", block_length, 1)
        rows, masks = [], []
        if len(tokens) != len(masked):
            raise ArgumentError("mask", f"{len(masked)} rows", allowed=f"one for each of {len(tokens)} rows of tokens")
        for index, (row, mask) in enumerate(zip(tokens, masked, strict=True)):
            row_ids, row_mask = np.asarray(list(row), np.int32), np.asarray(list(mask), bool)
            if row_ids.shape != row_mask.shape:
                raise ArgumentError(f"mask[{index}]", f"{row_mask.size} entries",
                                    allowed=f"one for each of its row's {row_ids.size} tokens")
            rows.append(np.where(row_mask, np.int32(mask_id), row_ids))
            masks.append(row_mask)
        lead = [int(mask.argmax()) if mask.any() else len(mask) for mask in masks]
        if align:
            lead = [first // block_length * block_length for first in lead]
        return cls._lay_out(rows, masks, lead, block_length=block_length, mask_id=mask_id, pad_id=pad_id,
                            bucket=bucket, worst_rest=block_length if align else 1)

    @classmethod
    def _lay_out(
        cls, rows: list[np.ndarray], masks: list[np.ndarray], lead: list[int], *, block_length: int,
        mask_id: int, pad_id: int, bucket: bool, worst_rest: int,
    ) -> Canvas:
        """Shift each row so that its `lead` first tokens end at the common start of block 0."""
        if not rows:
            raise ArgumentError("prompts", "none", allowed="at least one row", advice="give one")
        rest = max(max(len(row) - n for row, n in zip(rows, lead, strict=True)), worst_rest)
        first_block, num_blocks = max(lead), -(-rest // block_length)
        if bucket:
            first_block, num_blocks = bucket_size(first_block, minimum=16), bucket_size(num_blocks, minimum=1)
        shape = (len(rows), first_block + num_blocks * block_length)
        tokens = np.full(shape, pad_id, np.int32)
        is_masked, valid = np.zeros(shape, bool), np.zeros(shape, bool)
        positions = np.zeros(shape, np.int32)
        for index, (row, mask, n) in enumerate(zip(rows, masks, lead, strict=True)):
            here = slice(first_block - n, first_block - n + len(row))
            tokens[index, here], is_masked[index, here], valid[index, here] = row, mask, True
            positions[index, here] = np.arange(len(row))
        return cls(
            tokens=jax.device_put(tokens), is_masked=jax.device_put(is_masked), valid=jax.device_put(valid),
            positions=jax.device_put(positions), mask_id=jax.device_put(np.int32(mask_id)),
            first_block=first_block, block_length=block_length)


def bucket_size(size: int, *, minimum: int) -> int:
    """The smallest of `minimum`, 2^k and 3 * 2^k that is at least `size`: at most a third is padding."""
    power = 1
    while True:
        for candidate in (power, 3 * power // 2):
            if candidate >= max(size, minimum):
                return candidate
        power *= 2

