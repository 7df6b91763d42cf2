"""Keys of each family's checkpoints: one file each, one line here."""

from convert.families import llada2_moe, llada_moe

FAMILIES = [
    llada_moe.FAMILY,
    llada2_moe.FAMILY,
]
"""All of them, in the order in which they are asked whose a config.json is."""
