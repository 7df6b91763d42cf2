"""What everything speaks: structs, arrays that travel, protocols, the canvas, the cache, keys."""
