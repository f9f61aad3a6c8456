"""Sets of images, and what becomes of them before a model sees them."""
