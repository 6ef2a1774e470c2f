"""What a model attends to and what a stream holds on to: the paper's observations, and the carried cache drawn."""
