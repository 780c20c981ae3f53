"""Pages on disk: slots, background writes, read-ahead."""
