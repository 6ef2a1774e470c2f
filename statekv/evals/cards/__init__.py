"""Films that the package makes itself, and questions about them."""
