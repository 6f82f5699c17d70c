"""A folder or a list in; upright RGB pixels, or a reason why not, out."""
