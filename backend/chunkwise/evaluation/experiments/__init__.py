"""The experiments behind the README's claims: each runs arms on adapters and their tasks through `evaluation.driver`
and reports tables and a plot. `lab` runs arms and keeps their results; `command` is the entry."""
