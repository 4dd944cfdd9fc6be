"""Placement: which device holds which experts, decided from traces; pure functions, alike on every rank."""
