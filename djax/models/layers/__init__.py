"""Building blocks of the families' layers."""
