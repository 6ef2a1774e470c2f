"""One loaded model at work: segments in, tokens out."""
