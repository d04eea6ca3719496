"""Generation of pictures; transition kernels and rollouts."""
