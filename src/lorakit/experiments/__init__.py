"""Experiments: several configurations on one base and one task, several seeds each, compared fairly; and the search for a better one."""
