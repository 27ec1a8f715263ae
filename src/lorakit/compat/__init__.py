"""Other libraries' names over this one. Nothing in lorakit imports it."""
