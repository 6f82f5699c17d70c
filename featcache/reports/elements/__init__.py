"""What pages and pictures are made of. Values in, markup, SVG or pixels out; nothing here knows of models.

page.py        the one way to make a page: templates of pages/, escaped, under a Content-Security-Policy
cards.py       pictures with what is known of them, for pages
charts.py      charts as SVG
chart_parts.py what they are made of: axes, lines, words
thumbnails.py  small pictures within a budget
pictures.py    the image files of rows, found by digest
projection.py  embeddings on a plane: principal components, t-SNE, and how far to trust it
wall.py        an order in which similar pictures are neighbours
drawing.py     letters, sizes and files of pictures
numbers.py     numbers as people read them
"""
