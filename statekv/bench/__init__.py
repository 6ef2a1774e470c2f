"""Questions to the clock: what a step, an answer, a video cost, how far that is from the machine's floor."""
