"""One module per corpus: the folder as distributed in, a manifest out."""
