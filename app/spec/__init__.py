"""The contract: what a user may ask for, in pydantic and without torch."""
