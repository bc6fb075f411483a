"""The mathematics: operators, implicit maps, solvers, gradients, networks, baselines."""
