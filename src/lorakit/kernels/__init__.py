"""Fast paths as plain functions, each beside the slow definition it must equal."""
