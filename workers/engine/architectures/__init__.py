"""What models are made of, and how each family is loaded by its own loader."""
