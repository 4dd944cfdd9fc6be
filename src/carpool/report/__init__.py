"""One HTML file that shows what evaluations found."""
