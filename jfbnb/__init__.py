"""jfbnb: implicit networks for inverse problems, trained with Jacobian-free backpropagation."""

from importlib.metadata import version

__version__ = version("jfbnb")
