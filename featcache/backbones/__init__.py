"""Name and weights in; embeddings of images out."""
