"""A synthetic needle, order and count task in words, for any causal language model."""
