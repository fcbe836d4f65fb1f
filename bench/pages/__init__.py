"""What the bench writes from its records: tables, plots, report.html, and the tables of README and documentation."""
