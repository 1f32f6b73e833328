"""The recipes that ship with mer."""
