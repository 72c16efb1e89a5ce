"""The networks that a config can name, their building blocks' sizes and costs."""
