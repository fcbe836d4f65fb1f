"""Sums of two digits as prompts, and a reward that checks them: the data of the recipe grpo-sums."""
