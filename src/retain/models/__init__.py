"""Network generations."""
