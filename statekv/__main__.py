"""`python -m statekv`: the command line."""

from statekv.cli import main

main()
