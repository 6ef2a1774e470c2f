"""Fewer tokens of a step, between vision tower and language model: one file a method."""
