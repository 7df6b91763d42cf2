"""The decoders' parts, one folder or file per axis."""
