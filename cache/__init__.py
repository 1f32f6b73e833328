"""The embedding cache: identity, store, reader. Knows nothing of models."""
