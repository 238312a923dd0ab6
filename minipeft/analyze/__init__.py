"""What a method did to a model, and what it cost."""
