"""The language of all rooms: structs, data that travels, protocols, the canvas, the cache, keys."""
