"""What the verbs do, with their progress shown."""
