"""What the families' layers are made of."""
