"""The compression library: model in, smaller model and measurements out. Knows no HTTP, queue or database."""
