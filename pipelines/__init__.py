"""Corpora, protocols, recipes, training, evaluation and voting."""
