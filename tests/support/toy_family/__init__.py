"""A dense family as an outsider would add it: a file for the model, one for its checkpoints."""
