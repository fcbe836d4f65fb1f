"""What the bench measures: one module per suite, with its cases and its implementations."""
