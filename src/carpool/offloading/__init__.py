"""Which experts are in fast memory: how local routing is, what caches would hit, and what is read meanwhile."""
