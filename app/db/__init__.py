"""The database is the truth: tables, the engine, and every query as a named function."""
