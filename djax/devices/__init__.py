"""Meshes, sharding rules, collectives, processes."""
