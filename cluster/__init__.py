"""The `scoreray` command, the demo, and what starts things on clusters."""
