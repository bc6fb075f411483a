"""The `jfbnb` command, and the runner of the notebooks."""
