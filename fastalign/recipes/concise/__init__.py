"""Preference pairs in which a short and complete answer beats a rambling one: see README.md."""
