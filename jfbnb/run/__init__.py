"""The `jfbnb` command, and what runs the notebooks."""
