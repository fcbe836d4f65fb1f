"""What alignment costs, and what holds the cost down: see README.md."""
