"""The metrics of evaluations: their list, what they read, the function behind each, and the record of what came out."""
