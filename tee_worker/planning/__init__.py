"""What is moved at which split, and what that costs."""
