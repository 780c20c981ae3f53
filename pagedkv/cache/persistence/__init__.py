"""Sequences in files: snapshots, and stores that outlive the process."""
