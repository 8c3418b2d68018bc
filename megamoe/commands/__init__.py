"""What tools/ start: each module has the `main` of the program of its name."""
