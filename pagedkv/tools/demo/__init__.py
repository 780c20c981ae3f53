"""A small model and a long text to try everything with."""
