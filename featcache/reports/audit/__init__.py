"""The page of an audit, on which people decide what becomes of each image.

items.py    findings as what is decided at once: a group of copies, or an image with all that is remarkable about it
columns.py  what the page's script knows of them: columns, and pictures within a budget
page.py     the page
"""
