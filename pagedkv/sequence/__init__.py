"""One sequence: its layers' tokens, when they are sealed, what it shares with others."""
