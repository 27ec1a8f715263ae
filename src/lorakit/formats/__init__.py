"""Adapters on disk: atomic folders, the PEFT folder and our own, receipts."""
