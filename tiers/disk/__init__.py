"""Whole reads and writes, locks, checksums: file descriptors and bytes."""
