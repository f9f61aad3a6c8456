"""What an uploaded file is, from its headers alone, never by loading it."""
