"""The sealed pages of one layer: where each is, and how it moves."""
