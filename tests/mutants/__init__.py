"""Does a test fail with each of many small faults? `python -m tests.mutants` tries."""
