"""The demo world: synthetic videos with known answers, and the run that compares methods on them."""
