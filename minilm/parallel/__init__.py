"""One batch on several cores, or a part of it on each of several ranks."""
