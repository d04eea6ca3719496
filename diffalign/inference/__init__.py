"""Better pictures without touching weights: optimisation of noises, search over them, steering of sampling runs."""
