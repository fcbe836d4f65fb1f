"""Benchmarks of fastalign beside what people use today (`python -m bench --list`). Results: JSON in bench/results."""
