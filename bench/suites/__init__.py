"""What the bench measures: a module per suite, with its cases and its implementations."""
