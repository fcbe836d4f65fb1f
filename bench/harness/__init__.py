"""How the bench measures: candidates, their checks, times and memory, and what the suites share."""
