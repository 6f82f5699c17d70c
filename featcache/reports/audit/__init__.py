"""The page of an audit, on which people decide what becomes of each image.

items.py  findings as what is decided at once: a group of copies, or an image with all that is remarkable about it
page.py   the page
"""
