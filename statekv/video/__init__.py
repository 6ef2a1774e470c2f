"""Pixels with times: reads, samples, prefetches and writes video, and knows nothing of models."""
