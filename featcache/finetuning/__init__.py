"""A saved model and images in; a better saved model out."""
