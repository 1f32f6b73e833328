"""Stage one: audio front end, extractors by family, the engine that runs them into the cache."""
