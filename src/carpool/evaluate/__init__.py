"""Lockstep evaluation: what sharing experts saves and what it costs, with intervals."""
