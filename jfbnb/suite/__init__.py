"""What runs the notebooks, and the `jfbnb` command. The rest of the package knows neither."""
