"""Sequences on disk: manifest, file format, index, atomic commit."""
