"""Stage two's models: one file per paper, plain ``torch`` modules that know nothing of files."""
