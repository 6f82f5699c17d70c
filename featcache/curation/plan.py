"""``plan.csv``: what to do with each image of a cache, edited on the page or by hand; and the table that follows from it.

The file holds every image, so that neither the cache nor anything else is needed to apply it. A row without a decision is kept.
"""

# The first four are the contract; then the image's split, its label as the cache has it, and the kinds of findings about it.
COLUMNS = ("path", "sha256", "decision", "label", "split", "given", "found")
DECISIONS = (
    "keep",
    "drop",
    "relabel",
)  # ``label`` is the label to have: of ``relabel`` the new one, else the given one
