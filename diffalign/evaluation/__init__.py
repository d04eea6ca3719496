"""Measuring whether a tuned model is better: paired comparisons, held-out pairs, prompt sets, the report."""
