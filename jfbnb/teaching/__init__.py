"""The parts of the notebooks: figures, tables, explorers, exercises."""
