"""One batch on several cores."""
