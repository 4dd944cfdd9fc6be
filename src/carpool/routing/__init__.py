"""What a model does: its routing rule, who the rows are, exact arithmetic on scores."""
