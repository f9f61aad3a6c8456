"""Text in, token windows and statistics out."""
