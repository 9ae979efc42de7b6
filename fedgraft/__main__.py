"""`python -m fedgraft` is `fedgraft`."""

from fedgraft.cli import main

main()
