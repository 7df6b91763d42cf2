"""How the toy's checkpoints are read."""

from __future__ import annotations

from typing import Any

from convert.fields import COMMON_NAMES, Family, Fields
from convert.mapping import Rule, Table
from tests.support.toy_family.model import ToyConfig


def read(fields: Fields) -> dict[str, Any]:
    common = fields.common()
    eos = fields.eos(vocab_size=common["vocab_size"])
    return {**common, **eos, "pad_id": eos["eos_id"], "dense_size": fields.integer("intermediate_size")}


HEADS = {"q": "query", "k": "key", "v": "value"}
TABLE = Table(rules=(
    Rule(key="embed.weight", leaf="embed"),
    Rule(key="norm.weight", leaf="norm"),
    Rule(key="head.weight", leaf="head"),
    Rule(key="layers.{layer}.norm1.weight", leaf="layers.{layer}.attention_norm"),
    Rule(key="layers.{layer}.norm2.weight", leaf="layers.{layer}.mlp_norm"),
    *(Rule(key=f"layers.{{layer}}.{one}.weight", leaf=f"layers.{{layer}}.attention.{name}", merge=(2, 1))
      for one, name in HEADS.items()),
    Rule(key="layers.{layer}.o.weight", leaf="layers.{layer}.attention.output", merge=(1, 2)),
    *(Rule(key=f"layers.{{layer}}.{name}.weight", leaf=f"layers.{{layer}}.attention.{name}")
      for name in ("query_norm", "key_norm")),
    *(Rule(key=f"layers.{{layer}}.{name}.weight", leaf=f"layers.{{layer}}.mlp.{name}")
      for name in ("gate", "up", "down"))))

FAMILY = Family(
    title="toy", config=ToyConfig, model_type="toy", names={**COMMON_NAMES, "dense_size": "intermediate_size"},
    fixed={"tie_word_embeddings": (None, False)}, read=read, table=TABLE)
