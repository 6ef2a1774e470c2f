"""What README, docs and examples say is run, and is so."""
