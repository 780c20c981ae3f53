"""What measures and tries the engine; nothing below imports it."""
