"""What there is, in words, tables and pictures."""
