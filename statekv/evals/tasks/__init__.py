"""Benchmarks of published papers, and our own."""
