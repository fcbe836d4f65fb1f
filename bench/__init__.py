"""fastalign measured beside what people use today: `python -m bench --list`. Results are JSON in bench/results."""
