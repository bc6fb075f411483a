"""A user's photograph: its file, its kernel, its restoration, and whether the model fits it."""
