"""One softmax over hot, warm and cold tokens."""
