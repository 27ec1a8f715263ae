"""Experiments: several configurations on one base and one task, several seeds each, compared fairly."""
