"""Which keys go on to the next step: one file a policy, tensors only."""
