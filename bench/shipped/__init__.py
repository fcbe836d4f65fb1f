"""Writes the small suites that fastalign ships: `python -m bench.shipped`. Every item is written for this project."""
