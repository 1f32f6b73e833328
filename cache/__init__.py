"""The embedding cache: identity, store, reader, writer. ``FORMAT.md`` specifies the files.

It knows nothing of models and imports neither torch nor a Zarr library.
"""
