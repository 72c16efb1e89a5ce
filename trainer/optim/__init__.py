"""The optimizer, whose state holds the averages of the weights, and the fragments of its sharded state."""
