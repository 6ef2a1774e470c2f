"""The paper's table, run anew: what must be there, what it will take, and the figures to compare with."""
