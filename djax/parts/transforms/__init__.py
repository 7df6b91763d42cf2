"""Logit transforms: logits in, logits out, with a state that lives for one block.

All work in float32 and drop a token by setting its logit to -inf. Those that need no logits do the same to a `Reading`,
in which the vocabulary is already gone.
"""

from djax.parts.transforms.basic import ForbidTokens, Identity
from djax.parts.transforms.chain import Chain
from djax.parts.transforms.credit import Credit, CreditState
from djax.parts.transforms.filters import MinP, TopK, TopP

__all__ = ["Chain", "Credit", "CreditState", "ForbidTokens", "Identity", "MinP", "TopK", "TopP"]
