"""mer: compute speech embeddings once, train emotion-recognition heads in seconds."""

__version__ = "0.1.0"
