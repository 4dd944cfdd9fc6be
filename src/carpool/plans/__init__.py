"""A policy with its guards: its text form, policy files, and the one way from logits to a routing."""
