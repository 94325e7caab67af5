"""Text that is fit to learn from: what is thrown away, and why."""
