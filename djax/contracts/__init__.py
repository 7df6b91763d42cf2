"""The language of all rooms: structs, the data that travels, protocols, the canvas, the cache, keys."""
