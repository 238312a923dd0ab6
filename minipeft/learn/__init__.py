"""How models are trained and scored."""
