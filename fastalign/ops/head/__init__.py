"""What the ops over an output layer share: options, checks, scored rows, tiles of the vocabulary."""
