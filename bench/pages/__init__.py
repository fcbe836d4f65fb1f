"""What the bench writes from its records: tables, plots, report.html and README's tables."""
