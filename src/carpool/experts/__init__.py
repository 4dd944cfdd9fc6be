"""What an expert weighs and what can stand in for it."""
