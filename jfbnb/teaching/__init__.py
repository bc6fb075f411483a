"""What the notebooks show: figures, tables, explorers, exercises."""
