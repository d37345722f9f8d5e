"""`python -m kdframe` is the command `kdframe`."""

from kdframe.cli import main

main()
