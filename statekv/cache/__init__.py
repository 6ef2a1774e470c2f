"""What one stream remembers: the carried cache, the detailed cache, and the state that holds both."""
