"""16-bit tokens to page bytes and back."""
