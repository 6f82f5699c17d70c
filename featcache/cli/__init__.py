"""Parse, call a plain function, print."""
