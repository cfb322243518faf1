"""Quality of what is served, measured on the serving engine itself. May import every room; only the CLI starts it.

The API for experiments is `driver` (run jobs under a steering mode) and `nll` (per-token log-likelihoods with the ranks
they cost); `bootstrap` gives intervals, also of paired differences.
"""
