"""`python -m movieq.cli`."""

from movieq.cli import main

main()
