"""How much quality a paged cache keeps of what the fp16 cache has."""
