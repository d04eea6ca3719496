"""Rewards made of rewards, and the tensor functions underneath.

Pure functions, importing only torch: `aggregate` (ensembles), `groups` (ranks and win rates), `lagrange`, `moments`,
`pareto`, `transforms` (log-sigmoid, PAR), `uncertainty` (Ctrl-U weights), `views` (augmentations).
Rewards: `weighted_sum`, `ensembles`, `dropout`, `augmented`, `weights`, `against_base`, `in_group`, `constrained`;
`wrapper` and `normalise` are what they share, `base_scores` is the table of a base model's scores.
"""
