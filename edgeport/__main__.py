"""`python -m edgeport`."""

from edgeport.cli import main

main()
